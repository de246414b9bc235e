"""What an encoder is trained to predict: which output is compared with which later action.

The four of PinnerFormer's figure 2. Each takes the sequences of a batch and the positives of the whole log and
gives pairs (sequence, place in it, row of the action to predict); a mix gives each sequence one of them by share.
Only actions of the declared positive types, on known items, are ever predicted; all are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from encoder.arrays import I64, Bool

Kind = Literal["next_action", "sasrec", "all_action", "dense_all_action"]
DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class ObjectiveConfig:
    """Shares of the objectives and their limits."""

    shares: Mapping[Kind, float] = field(default_factory=lambda: {"sasrec": 1.0})
    """Probability that a sequence is trained on an objective; they need not sum to 1."""
    window_days: float = 28.0
    """How far ahead "all action" and "dense all action" look."""
    positions_max: int = 0
    """Positions sampled from each sequence by "dense all action" and "sasrec"; 0 takes all of them."""
    targets_max: int = 32
    """Positives sampled from each sequence's window by "all action"."""

    def __post_init__(self) -> None:
        if not self.shares or min(self.shares.values()) < 0 or sum(self.shares.values()) <= 0:
            raise ValueError("objective shares must be positive: name at least one of next_action, sasrec, ...")
        if self.window_days <= 0 or self.positions_max < 0 or self.targets_max < 1:
            raise ValueError("window_days and targets_max must be positive, positions_max at least 0")


@dataclass(frozen=True, slots=True)
class Pairs:
    """P things to predict."""

    sequence: I64
    """[P] row of the batch."""
    place: I64
    """[P] column of the batch: the output compared."""
    target: I64
    """[P] row of the log: the action to predict."""

    @staticmethod
    def joined(parts: list[Pairs]) -> Pairs:
        columns = ([getattr(part, name) for part in parts] for name in Pairs.__slots__)
        return Pairs(*(np.concatenate([np.zeros(0, np.int64), *column]) for column in columns))


class Positives:
    """The positive actions of a log, to be searched by user and time.

    A (user, time) pair becomes one integer, user * span + time, so that one sorted column serves every user; the log
    may hold users x its span in ms below 2^63 (a year of 290 million users).
    """

    def __init__(self, *, starts: I64, time_ms: I64, is_positive: Bool) -> None:
        self.starts = starts
        self.rows: I64 = np.flatnonzero(is_positive)
        self._before = np.concatenate([[0], np.cumsum(is_positive)])
        self._user = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        self._origin = int(time_ms.min(initial=0)) if len(time_ms) else 0
        self._time = time_ms - self._origin
        self._span = int(self._time.max(initial=0)) + 2
        if self._span * len(starts) >= 1 << 63:
            raise ValueError("log is too long for its number of users: train on fewer users or a shorter time")
        self._key = self._user[self.rows] * self._span + self._time[self.rows]

    def after(self, rows: I64) -> tuple[I64, I64]:
        """Bounds, into `self.rows`, of the positives of the same user in later rows of the log."""
        return self._before[rows + 1], self._before[self.starts[self._user[rows] + 1]]

    def within(self, rows: I64, window_ms: int) -> tuple[I64, I64]:
        """Bounds, into `self.rows`, of the same user's positives with times in (t, t + window]."""
        base = self._user[rows] * self._span
        time = self._time[rows]
        until = np.minimum(time + window_ms, self._span - 1)
        first = np.searchsorted(self._key, base + time, side="right")
        return first, np.searchsorted(self._key, base + until, side="right")


def make_pairs(sequences: I64, positives: Positives, config: ObjectiveConfig, rng: np.random.Generator) -> Pairs:
    """The pairs of a batch of sequences [B, L] (rows of the log, oldest first, -1 behind the end)."""
    kinds = list(config.shares)
    shares = np.array([config.shares[kind] for kind in kinds])
    choice = rng.choice(len(kinds), len(sequences), p=shares / shares.sum())
    parts = []
    for number, kind in enumerate(kinds):
        mine = np.flatnonzero(choice == number)
        pairs = _objective(kind, sequences[mine], positives, config, rng)
        parts.append(Pairs(mine[pairs.sequence], pairs.place, pairs.target))
    return Pairs.joined(parts)


def _objective(
    kind: Kind, sequences: I64, positives: Positives, config: ObjectiveConfig, rng: np.random.Generator
) -> Pairs:
    window_ms = round(config.window_days * DAY_MS)
    if kind == "next_action":
        return _next_positive(*_newest(sequences), sequences, positives)
    if kind == "sasrec":
        return _next_positive(*_sampled_places(sequences, config.positions_max, rng), sequences, positives)
    if kind == "all_action":
        return _all_in_window(sequences, positives, window_ms, config.targets_max, rng)
    sequence, place = _sampled_places(sequences, config.positions_max, rng)
    return _one_in_window(sequence, place, sequences, positives, window_ms, rng)


def _newest(sequences: I64) -> tuple[I64, I64]:
    lengths = (sequences >= 0).sum(axis=1)
    sequence = np.flatnonzero(lengths)
    return sequence, lengths[sequence] - 1


def _sampled_places(sequences: I64, positions_max: int, rng: np.random.Generator) -> tuple[I64, I64]:
    """Sequence and place of at most `positions_max` tokens of each sequence, of all where it is 0."""
    real = sequences >= 0
    if positions_max:
        score = np.where(real, rng.random(sequences.shape), 2.0)
        rank = score.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        real &= rank < positions_max
    sequence, place = np.nonzero(real)
    return sequence, place


def _next_positive(sequence: I64, place: I64, sequences: I64, positives: Positives) -> Pairs:
    first, last = positives.after(sequences[sequence, place])
    found = first < last
    return Pairs(sequence[found], place[found], positives.rows[first[found]])


def _one_in_window(
    sequence: I64, place: I64, sequences: I64, positives: Positives, window_ms: int, rng: np.random.Generator
) -> Pairs:
    first, last = positives.within(sequences[sequence, place], window_ms)
    found = first < last
    chosen = rng.integers(first[found], last[found])
    return Pairs(sequence[found], place[found], positives.rows[chosen])


def _all_in_window(
    sequences: I64, positives: Positives, window_ms: int, targets_max: int, rng: np.random.Generator
) -> Pairs:
    sequence, place = _newest(sequences)
    first, last = positives.within(sequences[sequence, place], window_ms)
    offsets = np.arange(int((last - first).max(initial=0)))
    inside = offsets < (last - first)[:, None]
    score = np.where(inside, rng.random(inside.shape), 2.0)
    inside &= score.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable") < targets_max
    which, offset = np.nonzero(inside)
    return Pairs(sequence[which], place[which], positives.rows[first[which] + offset])
