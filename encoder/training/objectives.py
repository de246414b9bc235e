"""Training objectives: which output of the encoder predicts which later action.

The four objectives are those of PinnerFormer (arXiv 2205.04507, figure 2). Each takes the sequences of
a batch and the positives of the whole log and returns pairs (sequence, position in it, log row of the action to
predict); a mix draws one objective per sequence, in proportion to the shares. Only actions of the configured positive
types on known items are predicted; the encoder reads all actions.

Shapes: B sequences, L actions, P pairs, N rows of the log, U users, Q queries (rows to search from).
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
    """Shares and limits of the objectives."""

    shares: Mapping[Kind, float] = field(default_factory=lambda: {"sasrec": 1.0})
    """Relative probability of each objective for a sequence; shares need not sum to 1."""
    window_days: float = 28.0
    """Length of the future window of `all_action` and `dense_all_action`."""
    positions_max: int = 0
    """Number of positions that `dense_all_action` and `sasrec` sample from each sequence; 0 takes all."""
    targets_max: int = 32
    """Number of positives that `all_action` samples from the window of each sequence."""

    def __post_init__(self) -> None:
        if not self.shares or min(self.shares.values()) < 0 or sum(self.shares.values()) <= 0:
            raise ValueError("objective shares must be positive: name at least one of next_action, sasrec, ...")
        if self.window_days <= 0 or self.positions_max < 0 or self.targets_max < 1:
            raise ValueError("window_days and targets_max must be positive, positions_max at least 0")


@dataclass(frozen=True, slots=True)
class Pairs:
    """P predictions: which output is compared with which later action."""

    sequence: I64
    """[P] row of the batch matrix."""
    position: I64
    """[P] column of the batch matrix: the output that predicts."""
    target: I64
    """[P] row of the log: the action to predict."""

    @staticmethod
    def concatenate(parts: list[Pairs]) -> Pairs:
        """Return the pairs of all parts, in order."""
        columns = ([getattr(part, name) for part in parts] for name in Pairs.__slots__)
        return Pairs(*(np.concatenate([np.zeros(0, np.int64), *column]) for column in columns))


class Positives:
    """The positive actions of a log, searchable by user and time.

    A pair (user, time) is packed into one integer, so one sorted column serves all users and one `searchsorted` call
    answers a whole batch:

        key = user * span + (time - origin)        with span > every time - origin

        user 0                user 1                user 2
        |--x--x--------x---|--|----x-x----------|--|x-----...
        0                  span                 2 * span

    Users times the log's span in ms must stay below 2^63: 290 million users for a log of one year.
    """

    def __init__(self, *, starts: I64, time_ms: I64, is_positive: Bool) -> None:
        self.starts = starts
        self.rows: I64 = np.flatnonzero(is_positive)  # ascending rows of the positives
        self._before = np.concatenate([[0], np.cumsum(is_positive)])  # [N + 1] positives in rows below each row
        self._user = np.repeat(np.arange(len(starts) - 1), np.diff(starts))  # [N]
        self._origin = int(time_ms.min(initial=0)) if len(time_ms) else 0
        self._time = time_ms - self._origin
        self._span = int(self._time.max(initial=0)) + 2
        if self._span * len(starts) >= 1 << 63:
            raise ValueError("log is too long for its number of users: train on fewer users or a shorter time")
        self._key = self._user[self.rows] * self._span + self._time[self.rows]

    def after(self, rows: I64) -> tuple[I64, I64]:
        """Return bounds [Q], [Q] into `self.rows`: the positives of the same user in later rows of the log."""
        return self._before[rows + 1], self._before[self.starts[self._user[rows] + 1]]

    def within(self, rows: I64, window_ms: int) -> tuple[I64, I64]:
        """Return bounds [Q], [Q] into `self.rows`: the same user's positives at times in (t, t + window]."""
        base = self._user[rows] * self._span
        time = self._time[rows]
        until = np.minimum(time + window_ms, self._span - 1)  # stays inside the user's own range of keys
        first = np.searchsorted(self._key, base + time, side="right")
        return first, np.searchsorted(self._key, base + until, side="right")


def make_pairs(sequences: I64, positives: Positives, config: ObjectiveConfig, rng: np.random.Generator) -> Pairs:
    """Return the pairs of a batch of sequences [B, L]: rows of the log, oldest first, padded with -1 at the end."""
    kinds = list(config.shares)
    shares = np.array([config.shares[kind] for kind in kinds])
    choice = rng.choice(len(kinds), len(sequences), p=shares / shares.sum())
    parts = []
    for number, kind in enumerate(kinds):
        mine = np.flatnonzero(choice == number)
        pairs = _objective(kind, sequences[mine], positives, config, rng)
        parts.append(Pairs(mine[pairs.sequence], pairs.position, pairs.target))
    return Pairs.concatenate(parts)


def _objective(
    kind: Kind, sequences: I64, positives: Positives, config: ObjectiveConfig, rng: np.random.Generator
) -> Pairs:
    window_ms = round(config.window_days * DAY_MS)
    if kind == "next_action":
        return _next_positive(*_newest(sequences), sequences, positives)
    if kind == "sasrec":
        return _next_positive(*_sampled_positions(sequences, config.positions_max, rng), sequences, positives)
    if kind == "all_action":
        return _all_in_window(sequences, positives, window_ms, config.targets_max, rng)
    sequence, position = _sampled_positions(sequences, config.positions_max, rng)
    return _one_in_window(sequence, position, sequences, positives, window_ms, rng)


def _newest(sequences: I64) -> tuple[I64, I64]:
    """Return sequence and position of the newest action of each sequence that is not empty."""
    lengths = (sequences >= 0).sum(axis=1)  # [B]
    sequence = np.flatnonzero(lengths)
    return sequence, lengths[sequence] - 1


def _sampled_positions(sequences: I64, positions_max: int, rng: np.random.Generator) -> tuple[I64, I64]:
    """Return sequence and position of `positions_max` random tokens of each sequence, or of all tokens if it is 0."""
    real = sequences >= 0
    if positions_max:
        score = np.where(real, rng.random(sequences.shape), 2.0)  # [B, L]; padding sorts last
        # Two argsorts turn scores into ranks: the n tokens with the lowest scores are a uniform sample.
        rank = score.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        real &= rank < positions_max
    sequence, position = np.nonzero(real)
    return sequence, position


def _next_positive(sequence: I64, position: I64, sequences: I64, positives: Positives) -> Pairs:
    """Pair each output [P] with the next positive of its user, if there is one."""
    first, last = positives.after(sequences[sequence, position])
    found = first < last
    return Pairs(sequence[found], position[found], positives.rows[first[found]])


def _one_in_window(
    sequence: I64, position: I64, sequences: I64, positives: Positives, window_ms: int, rng: np.random.Generator
) -> Pairs:
    """Pair each output [P] with one random positive in the window after it, if there is one."""
    first, last = positives.within(sequences[sequence, position], window_ms)
    found = first < last
    chosen = rng.integers(first[found], last[found])
    return Pairs(sequence[found], position[found], positives.rows[chosen])


def _all_in_window(
    sequences: I64, positives: Positives, window_ms: int, targets_max: int, rng: np.random.Generator
) -> Pairs:
    """Pair the newest output of each sequence with at most `targets_max` random positives in the window after it."""
    sequence, position = _newest(sequences)
    first, last = positives.within(sequences[sequence, position], window_ms)
    offsets = np.arange(int((last - first).max(initial=0)))  # [W], W positives in the fullest window
    inside = offsets < (last - first)[:, None]  # [sequences, W]
    score = np.where(inside, rng.random(inside.shape), 2.0)
    inside &= score.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable") < targets_max
    which, offset = np.nonzero(inside)
    return Pairs(sequence[which], position[which], positives.rows[first[which] + offset])
