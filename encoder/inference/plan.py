"""Which rows each layer has to compute, for users with any number of new actions.

The embedding is read at the newest position, so deeper layers need fewer rows: layer `l` must hold keys and values
for the newest `reach[l] = 1 + sum of (window - 1) over layers l and above` positions and needs its output only for
the newest `reach[l + 1]`; after the last layer that is one. For a cold user this dependency cone saves more than half
of the work; for a user with one new action it is one row everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from encoder.arrays import I64

Int64s = I64


@dataclass(frozen=True, slots=True)
class LayerRows:
    """The rows of one layer: user s owns rows starts[s] to starts[s + 1], its newest ones, oldest first."""

    starts: Int64s
    """[S + 1]."""
    tokens: Int64s
    """[S] index, among the tokens of the plan, of the user's first row."""
    silent: Int64s
    """[S] leading rows of the user that only write keys and values: no later layer reads their output."""
    kept: Int64s | None
    """[sum of rows - silent] rows whose output the next layer takes; None when it takes them all."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The new tokens of S users, one user after another, each oldest first, and the rows of every layer."""

    slots: Int64s
    """[S]."""
    offsets: Int64s
    """[T] position of the token counted from the oldest action in the slot; the ring of a window W is `offset % W`."""
    positions: Int64s
    """[T] position counted from the user's first action ever."""
    starts: Int64s
    """[S + 1]."""
    layers: tuple[LayerRows, ...]


def reaches(windows: Sequence[int]) -> list[int]:
    """How many newest positions matter at the input of each layer, and (one) after the last; length L + 1."""
    reach = [1]
    for window in reversed(windows):
        reach.append(reach[-1] + window - 1)
    return reach[::-1]


def plan_tokens(slots: Int64s, counts: Int64s, fresh: Int64s, firsts: Int64s, windows: Sequence[int]) -> Plan:
    """The plan for users that have seen `counts` actions, of which the newest `fresh` (at least 1) are not in the slot.

    `fresh` must not exceed `reaches(windows)[0]`. All arguments but `windows` are [S].
    """
    starts = offsets_of(fresh)
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], fresh)
    positions = np.repeat(counts - fresh, fresh) + within
    offsets = positions - np.repeat(firsts, fresh)
    return Plan(slots, offsets, positions, starts, _layers(fresh, starts, windows))


def _layers(fresh: Int64s, starts: Int64s, windows: Sequence[int]) -> tuple[LayerRows, ...]:
    reach = reaches(windows)
    rows = fresh
    row_starts = starts
    layers = []
    for below in reach[1:]:
        kept_rows = np.minimum(rows, below)
        silent = rows - kept_rows
        tokens = starts[1:] - rows
        kept = suffixes(row_starts, kept_rows) if silent.any() else None
        layers.append(LayerRows(row_starts, tokens, silent, kept))
        if kept is not None:
            rows, row_starts = kept_rows, offsets_of(kept_rows)
    return tuple(layers)


def suffixes(starts: Int64s, lengths: Int64s) -> Int64s:
    """Indices of the last `lengths[s]` rows of each segment, in order."""
    first = starts[1:] - lengths
    ends = np.cumsum(lengths)
    return np.repeat(first - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def offsets_of(lengths: Int64s) -> Int64s:
    """[S + 1] running starts of segments of these lengths."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts
