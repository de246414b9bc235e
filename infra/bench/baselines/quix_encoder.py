"""Quix Streams with an encoder, in the style of its documentation: a stateful function embeds the user of each event.

Environment: BROKER, GROUP, TOPIC, OUTPUT, FOLDER, KEPT, RELEASE.
"""

import os

from quixstreams import Application, State

from infra.bench.baselines.full_pass import FullPass, row

KEPT = int(os.environ["KEPT"])
encoder = FullPass()


def embed(action: dict, state: State) -> bytes | None:
    """Keep an action; return the embedding of a user with a full sequence."""
    kept = [*state.get("kept", [])[1 - KEPT :], row(action)]
    state.set("kept", kept)
    return encoder.embed(kept) if len(kept) == KEPT else None


app = Application(
    broker_address=os.environ["BROKER"],
    consumer_group=os.environ["GROUP"],
    auto_offset_reset="earliest",
    commit_interval=1.0,
    state_dir=os.environ["FOLDER"],
)
actions = app.topic(os.environ["TOPIC"], value_deserializer="json")
embeddings = app.topic(os.environ["OUTPUT"], value_serializer="bytes")
frame = app.dataframe(actions)
frame = frame.apply(embed, stateful=True)
frame = frame[frame.apply(lambda embedding: embedding is not None)]
frame.to_topic(embeddings)

if __name__ == "__main__":
    app.run()
