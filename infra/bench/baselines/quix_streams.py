"""Quix Streams in the style of its documentation: a stateful function over a StreamingDataFrame.

Environment: BROKER, GROUP, TOPIC, OUTPUT, FOLDER, EVERY_N, KEPT.
"""

import os

from quixstreams import Application, State

KEPT, EVERY_N = int(os.environ["KEPT"]), int(os.environ["EVERY_N"])
FIELDS = ("item_id", "action", "timestamp_ms")


def keep(action: dict, state: State) -> int:
    """Keep an action and return the count of its user."""
    sequence = state.get("sequence") or {"count": 0, "kept": []}
    kept = [*sequence["kept"][1 - KEPT :], [action[field] for field in FIELDS]]
    count = sequence["count"] + 1
    state.set("sequence", {"count": count, "kept": kept})
    return count


app = Application(
    broker_address=os.environ["BROKER"],
    consumer_group=os.environ["GROUP"],
    auto_offset_reset="earliest",
    commit_interval=1.0,
    state_dir=os.environ["FOLDER"],
)
actions = app.topic(os.environ["TOPIC"], value_deserializer="json")
due = app.topic(os.environ["OUTPUT"], value_serializer="json")
frame = app.dataframe(actions)
frame = frame.apply(keep, stateful=True)
frame = frame[frame.apply(lambda count: count % EVERY_N == 0)]
frame.to_topic(due)

if __name__ == "__main__":
    app.run()
