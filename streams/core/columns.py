"""Columns, and the index arithmetic that the core does on them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from encoder.arrays import I64, Bool

Columns = npt.NDArray[np.void]
"""A one-dimensional structured array: one row per user, chunk or action."""


def spans(first: I64, lengths: I64) -> tuple[I64, I64]:
    """Concatenate the ranges `first[i] ... first[i] + lengths[i] - 1`; return each element's `i` and its value.

    >>> owner, value = spans(np.array([10, 50, 70]), np.array([3, 0, 2]))
    >>> owner.tolist(), value.tolist()
    ([0, 0, 0, 2, 2], [10, 11, 12, 70, 71])
    """
    owner = np.repeat(np.arange(len(first)), lengths)  # [sum(lengths)]
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # place within its own range
    return owner, first[owner] + rank


def starts_of(lengths: I64) -> I64:
    """Return where each of U consecutive runs starts, and the end of the last: [U] lengths to [U + 1] starts.

    >>> starts_of(np.array([3, 0, 2])).tolist()
    [0, 3, 3, 5]
    """
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))


def rows_where(mask: Bool) -> I64:
    """Return the indices at which a one-dimensional mask is True; `np.flatnonzero` is equal and four times slower."""
    return mask.nonzero()[0]


def run_starts(groups: I64) -> I64:
    """Return where each run of equal values begins; `np.diff` with `prepend` is equal and five times slower.

    >>> run_starts(np.array([7, 7, 4, 9, 9, 9])).tolist()
    [0, 2, 3]
    """
    is_start = np.ones(len(groups), np.bool_)
    np.not_equal(groups[1:], groups[:-1], out=is_start[1:])
    return rows_where(is_start)


def run_lengths(starts: I64, end: int) -> I64:
    """Return the length of each run that begins at `starts`; the last one reaches up to `end`.

    >>> run_lengths(np.array([0, 2, 3]), 6).tolist()
    [2, 1, 3]
    """
    ends = np.empty_like(starts)
    ends[:-1], ends[-1:] = starts[1:], end
    return ends - starts
