"""Faust in the style of its documentation: an agent that processes one event at a time and assigns to a table.

Environment: BROKER, GROUP, TOPIC, OUTPUT, FOLDER, EVERY_N, KEPT.
"""

import os

import faust

KEPT, EVERY_N = int(os.environ["KEPT"]), int(os.environ["EVERY_N"])


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
due = app.topic(os.environ["OUTPUT"], key_type=str, value_type=int)
sequences = app.Table("sequences", default=dict, partitions=4)


@app.agent(actions)
async def keep(stream):
    """Keep each action and publish the count of a user whose trigger fires."""
    async for action in stream:
        sequence = sequences[action.user_id] or {"count": 0, "kept": []}
        kept = [*sequence["kept"][1 - KEPT :], [action.item_id, action.action, action.timestamp_ms]]
        count = sequence["count"] + 1
        sequences[action.user_id] = {"count": count, "kept": kept}
        if count % EVERY_N == 0:
            await due.send(key=action.user_id, value=count)


if __name__ == "__main__":
    app.main()
