"""The plan of a forward pass: which rows each layer has to compute, for users with any number of new actions.

The embedding is read at the newest position, so deeper layers need fewer rows. Layer `l` must hold keys and values for
the newest `reach[l] = 1 + sum of (window - 1) over layers l and above` positions, and its output is needed only for the
newest `reach[l + 1]`; after the last layer that is one. With two layers of window 3:

    position (newest is 9)     5   6   7   8   9
    input of layer 0           x   x   x   x   x      reach[0] = 5
    input of layer 1                   x   x   x      reach[1] = 3
    output                                     x      reach[2] = 1

For a cold user this saves more than half of the work. For a user with one new action it is one row everywhere.

Shapes: S users, T tokens (new actions), R rows of a layer, L layers. Tokens and rows are packed: one user after
another, each oldest first, and `starts` [S + 1] bounds the users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from encoder.arrays import I64


@dataclass(frozen=True, slots=True)
class LayerRows:
    """The rows of one layer: user s owns rows starts[s] to starts[s + 1], which are its newest tokens.

    tokens of user s        plan.starts[s] .... tokens[s] .................. plan.starts[s + 1]
    rows of this layer                          starts[s] .................. starts[s + 1]
    rows of the next one                        |<- silent[s] ->|<- kept --->|
    """

    starts: I64
    """Row [S + 1] at which each user begins; the last entry is R."""
    tokens: I64
    """Token [S] of the plan that is the user's first row."""
    silent: I64
    """Number [S] of leading rows of the user that only write keys and values: no later layer reads their output."""
    kept: I64 | None
    """Rows [R - sum of silent] whose output the next layer takes; None when it takes them all."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The new tokens of S users, and the rows of every layer."""

    slots: I64
    """Slot [S] of each user."""
    offsets: I64
    """Position [T] of the token counted from the oldest action in the slot; a ring of W places keeps it in
    `offset % W`."""
    positions: I64
    """Position [T] of the token counted from the user's first action ever."""
    starts: I64
    """Token [S + 1] at which each user begins; the last entry is T."""
    layers: tuple[LayerRows, ...]


def plan_tokens(slots: I64, counts: I64, fresh: I64, firsts: I64, windows: Sequence[int]) -> Plan:
    """Return the plan for users with `counts` [S] actions, of which the newest `fresh` [S] are not in the slot yet.

    `fresh` is at least 1 and at most `reaches(windows)[0]`. `firsts` [S] are the positions that the slots count from.

    >>> one = np.array([1])
    >>> plan = plan_tokens(one, counts=np.array([10]), fresh=np.array([5]), firsts=np.array([4]), windows=(3, 3))
    >>> plan.positions, plan.offsets
    (array([5, 6, 7, 8, 9]), array([1, 2, 3, 4, 5]))
    >>> [(layer.silent.tolist(), layer.kept.tolist()) for layer in plan.layers]
    [([2], [2, 3, 4]), ([2], [2])]
    """
    starts = offsets_of(fresh)  # [S + 1]
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], fresh)  # [T] 0 to fresh - 1 for each user
    positions = np.repeat(counts - fresh, fresh) + within  # [T]
    offsets = positions - np.repeat(firsts, fresh)  # [T]
    return Plan(slots, offsets, positions, starts, _layers(fresh, starts, windows))


def reaches(windows: Sequence[int]) -> list[int]:
    """Return the number of newest positions that matter at the input of each layer and after the last: [L + 1].

    >>> reaches((3, 3))
    [5, 3, 1]
    """
    reach = [1]
    for window in reversed(windows):
        reach.append(reach[-1] + window - 1)
    return reach[::-1]


def suffixes(starts: I64, lengths: I64) -> I64:
    """Return the indices of the last `lengths[s]` rows of each segment, segment by segment in ascending order.

    Segment s is rows starts[s] to starts[s + 1]:

    >>> suffixes(np.array([0, 4, 6, 9]), np.array([2, 0, 3]))  # segments 0 1 2 3 | 4 5 | 6 7 8
    array([2, 3, 6, 7, 8])
    """
    first = starts[1:] - lengths  # [S] first index that is wanted of each segment
    ends = np.cumsum(lengths)  # [S]
    # The result at i is first[s] + (i - number of results before segment s).
    return np.repeat(first - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def offsets_of(lengths: I64) -> I64:
    """Return the starts [S + 1] of packed segments with these lengths [S], and their total.

    >>> offsets_of(np.array([4, 2, 3]))
    array([0, 4, 6, 9])
    """
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _layers(fresh: I64, starts: I64, windows: Sequence[int]) -> tuple[LayerRows, ...]:
    reach = reaches(windows)
    rows = fresh  # [S] rows of each user in the current layer
    row_starts = starts  # [S + 1]
    layers = []
    for below in reach[1:]:
        kept_rows = np.minimum(rows, below)  # [S]
        silent = rows - kept_rows  # [S]
        tokens = starts[1:] - rows  # [S] a layer's rows are the user's newest tokens
        kept = suffixes(row_starts, kept_rows) if silent.any() else None
        layers.append(LayerRows(row_starts, tokens, silent, kept))
        if kept is not None:
            rows, row_starts = kept_rows, offsets_of(kept_rows)
    return tuple(layers)
