"""Split the demo's log at a midnight: the older part is the past of every user, the newer part is replayed."""

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
    """Return MovieLens-1M, or generated actions if a policy is given or the download fails, which `notice` reports."""
    if generated is None:
        try:
            return cut_at_midnight("MovieLens-1M", load_log(movielens_1m(notice)), newer_events)
        except DatasetUnavailable as error:
            notice(f"{error}")
            notice("using generated actions instead of MovieLens-1M")
    policy = generated or GeneratorPolicy(users=4_000, events=600_000)
    origin = f"generated actions (seed {seed})"
    return cut_at_midnight(origin, event_log(generate(policy, seed)), newer_events)


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
