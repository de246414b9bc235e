"""The demo's log, cut in two at a midnight: the older part is the past of every user, the newer part is replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from encoder.arrays import I64
from infra.datasets.event_log import EventLog, event_log, load_log
from infra.datasets.generator import GeneratorPolicy, generate
from infra.datasets.movielens import DatasetUnavailable, movielens_1m
from infra.errors import InfraError

DAY_MS = 86_400_000


class LogTooShort(InfraError):
    """The log leaves nothing to train on."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A log whose first `cut` rows are the older part."""

    origin: str
    """What the actions are, for people."""
    log: EventLog
    cut: int

    @property
    def older(self) -> EventLog:
        return self.log.head(self.cut)

    @property
    def newer(self) -> EventLog:
        return replace(
            self.log,
            user_index=self.log.user_index[self.cut :],
            timestamp_ms=self.log.timestamp_ms[self.cut :],
            latest_ms=self.log.latest_ms[self.cut :],
            table=self.log.table.slice(self.cut),
        )


def demo_parts(
    newer_events: int, generated: GeneratorPolicy | None, *, seed: int, notice: Callable[[str], None]
) -> Parts:
    """MovieLens-1M, or generated actions where a policy is given or the download fails; says which through `notice`."""
    if generated is None:
        try:
            return cut_at_midnight("MovieLens-1M", load_log(movielens_1m(notice)), newer_events)
        except DatasetUnavailable as error:
            notice(f"{error}")
            notice("going on with generated actions instead of MovieLens-1M")
    policy = generated or GeneratorPolicy(users=4_000, events=600_000)
    origin = f"generated actions (seed {seed})"
    return cut_at_midnight(origin, event_log(generate(policy, seed)), newer_events)


def cut_at_midnight(origin: str, log: EventLog, newer_events: int) -> Parts:
    """Cut at the last midnight of event time that leaves at least `newer_events` in the newer part.

    At a midnight "as of the last midnight" and "as of the start of the replay" begin as the same embedding. Raises
    `LogTooShort` when nothing lies before it.
    """
    first = max(0, len(log) - newer_events)
    midnight_ms = int(log.latest_ms[first]) // DAY_MS * DAY_MS
    cut = int(np.searchsorted(log.latest_ms, midnight_ms))
    if cut == 0:
        raise LogTooShort(
            "the log is too short for the demo",
            f"{len(log):,} events, none before the midnight that leaves {newer_events:,} to replay",
            "replay fewer",
        )
    return Parts(origin, log, cut)


def distinct_items(log: EventLog) -> tuple[list[str], I64]:
    """Item ids of a log and the index of each row's item among them."""
    encoded = log.table["item_id"].combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)
