"""Faust with an encoder, in the style of its documentation: an agent that embeds the user of each event.

Environment: BROKER, GROUP, TOPIC, OUTPUT, FOLDER, KEPT, RELEASE.
"""

import os

import faust

from infra.bench.baselines.full_pass import FullPass, row

KEPT = int(os.environ["KEPT"])


class Action(faust.Record, serializer="json"):
    """An event of the input topic."""

    user_id: str
    item_id: str
    action: str
    timestamp_ms: int
    surface: str = ""
    duration_ms: int = 0
    event_id: str = ""


app = faust.App(
    os.environ["GROUP"],
    broker=f"kafka://{os.environ['BROKER']}",
    store="rocksdb://",
    datadir=os.environ["FOLDER"],
    topic_partitions=4,
    broker_commit_interval=1.0,
    consumer_auto_offset_reset="earliest",
    web_enabled=False,
)
actions = app.topic(os.environ["TOPIC"], key_type=str, value_type=Action)
embeddings = app.topic(os.environ["OUTPUT"], key_type=str, value_type=bytes, value_serializer="raw")
sequences = app.Table("sequences", default=list, partitions=4)
encoder = FullPass()


@app.agent(actions)
async def embed(stream):
    """Keep each action and publish the embedding of a user with a full sequence."""
    async for action in stream:
        kept = [*sequences[action.user_id][1 - KEPT :], row(action.asdict())]
        sequences[action.user_id] = kept
        if len(kept) == KEPT:
            await embeddings.send(key=action.user_id, value=encoder.embed(kept))


if __name__ == "__main__":
    app.main()
