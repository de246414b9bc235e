"""Jobs for the encoder: users with their sequences as of one moment, as columns."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass

import numpy as np

from encoder.actions.columns import SequenceBatch
from encoder.arrays import I64, U8
from streams.core.columns import spans, starts_of


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """Users to embed, with their sequences as of one moment; row i of each column belongs to user i of `sequences`."""

    sequences: SequenceBatch
    offsets: I64
    """[U], source offset of the newest event that the embedding will contain."""
    newest_event_ms: I64
    """[U], event time of the newest action."""
    reasons: U8
    """[U] of `Reason`."""
    arrival_ms: I64
    """[U], arrival time of the event of `offsets`; LONG_AGO if it arrived before the user was loaded into memory."""
    features: Awaitable[bool] | None = None
    """Becomes whether the features of all its users are acknowledged; None where no features are computed."""

    def __len__(self) -> int:
        return len(self.sequences)

    def select(self, rows: I64) -> EncodeJob:
        """Return a job of only the users in `rows`."""
        batch = self.sequences
        lengths = np.diff(batch.starts)[rows]
        _, kept = spans(batch.starts[rows], lengths)
        sequences = SequenceBatch(
            users=[batch.users[row] for row in rows.tolist()],
            actions=batch.actions.take(kept),
            starts=starts_of(lengths),
            counts=batch.counts[rows],
            revisions=batch.revisions[rows],
        )
        columns = self.offsets[rows], self.newest_event_ms[rows], self.reasons[rows], self.arrival_ms[rows]
        return EncodeJob(sequences, *columns, self.features)


def merged(jobs: Sequence[EncodeJob]) -> EncodeJob:
    """Return one job of all users of several jobs, in order; no user may be in two of them."""
    if len(jobs) == 1:
        return jobs[0]
    batches = [job.sequences for job in jobs]
    lengths = np.concatenate([np.diff(batch.starts) for batch in batches])
    sequences = SequenceBatch(
        users=[user for batch in batches for user in batch.users],
        actions=np.concatenate([batch.actions for batch in batches]),
        starts=starts_of(lengths),
        counts=np.concatenate([batch.counts for batch in batches]),
        revisions=np.concatenate([batch.revisions for batch in batches]),
    )
    return EncodeJob(
        sequences,
        np.concatenate([job.offsets for job in jobs]),
        np.concatenate([job.newest_event_ms for job in jobs]),
        np.concatenate([job.reasons for job in jobs]),
        np.concatenate([job.arrival_ms for job in jobs]),
    )
