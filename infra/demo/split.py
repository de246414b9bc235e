"""Split the demo's log at a midnight: the older part is the past of every user, the newer part is replayed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from encoder.arrays import I64
from infra.datasets.event_log import EventLog, event_log, load_log
from infra.datasets.generator import GeneratorPolicy, generate
from infra.datasets.movielens import DatasetUnavailable, movielens_1m
from infra.errors import InfraError

DAY_MS = 86_400_000
WEEK_MS = 7 * DAY_MS


class LogTooShort(InfraError):
    """The log leaves no events to train on."""


@dataclass(frozen=True, slots=True)
class Split:
    """A log whose first `cut` rows are the older part."""

    origin: str
    """Source of the actions, as text."""
    log: EventLog
    cut: int

    @property
    def older(self) -> EventLog:
        """Events of the past."""
        return self.log.head(self.cut)

    @property
    def newer(self) -> EventLog:
        """Events to replay."""
        return replace(
            self.log,
            user_index=self.log.user_index[self.cut :],
            timestamp_ms=self.log.timestamp_ms[self.cut :],
            latest_ms=self.log.latest_ms[self.cut :],
            table=self.log.table.slice(self.cut),
        )


def demo_split(
    newer_events: int, generated: GeneratorPolicy | None, *, seed: int, notice: Callable[[str], None]
) -> Split:
    """Return MovieLens-1M, or generated actions if a policy is given or the download fails, which `notice` reports.

    Times are moved to the present, because the values of features are as of the present.
    """
    now_ms = time.time_ns() // 1_000_000
    if generated is None:
        try:
            log = with_ratings(moved(load_log(movielens_1m(notice)), now_ms))
            return cut_at_midnight("MovieLens-1M", log, newer_events)
        except DatasetUnavailable as error:
            notice(f"{error}")
            notice("using generated actions instead of MovieLens-1M")
    policy = generated or GeneratorPolicy(users=4_000, events=600_000)
    origin = f"generated actions (seed {seed})"
    return cut_at_midnight(origin, moved(event_log(generate(policy, seed)), now_ms), newer_events)


def moved(log: EventLog, now_ms: int) -> EventLog:
    """Move all times by whole weeks, so that the last event is at most a week old; weekdays and hours stay."""
    by_ms = (now_ms - int(log.latest_ms[-1])) // WEEK_MS * WEEK_MS
    times = log.timestamp_ms + by_ms
    place = log.table.column_names.index("timestamp_ms")
    table = log.table.set_column(place, "timestamp_ms", pa.array(times))
    return replace(log, timestamp_ms=times, latest_ms=log.latest_ms + by_ms, table=table)


def with_ratings(log: EventLog) -> EventLog:
    """Add the column `value`: the number in the name of the action, such as 4 of `rated_4`."""
    ratings = pc.cast(pc.utf8_slice_codeunits(log.table["action"], -1), pa.float64())
    return replace(log, table=log.table.append_column("value", ratings))


def cut_at_midnight(origin: str, log: EventLog, newer_events: int) -> Split:
    """Cut at the last midnight of event time that leaves at least `newer_events` in the newer part.

    At a midnight the embeddings "as of the last midnight" and "as of the start of the replay" are the same at first.
    Raises `LogTooShort` if no event precedes it.
    """
    first = max(0, len(log) - newer_events)
    midnight_ms = int(log.latest_ms[first]) // DAY_MS * DAY_MS
    cut = int(np.searchsorted(log.latest_ms, midnight_ms))
    if cut == 0:
        raise LogTooShort(
            "the log is too short for the demo",
            f"{len(log):,} events, none before the last midnight that leaves {newer_events:,} to replay",
            "replay fewer events with --newer, or take a longer log",
        )
    return Split(origin, log, cut)


def distinct_items(log: EventLog) -> tuple[list[str], I64]:
    """Return the item ids of a log and the index of each row's item among them."""
    encoded = log.table["item_id"].combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)
