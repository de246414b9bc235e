"""Features: from action columns to model inputs, by the same function in training, in batch and in the stream.

`Tokenizer.tokenize` looks ids up in the vocabularies of a release and computes the time gap to the user's previous
action; `Tokens.features` gathers any rows into integer tensors. All time arithmetic here is in integer milliseconds:
the model reduces times modulo its periods in float64 before anything becomes float32.

Shapes: N actions, U users, I items, R selected rows, L actions of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from encoder.actions.columns import Actions, name_code
from encoder.arrays import I64, U64

FEATURE_VERSION = 1
"""Version of the meaning of the columns below; a release trained with another version is rejected."""

UNKNOWN = 0
"""Row shared by all unknown items, action types or surfaces."""


@dataclass(frozen=True, slots=True)
class Vocabularies:
    """Known items, action types and surfaces of a release. Row 0 of each is `UNKNOWN`; known ids follow in order."""

    item_keys: U64
    """[I] item keys, strictly increasing; the key at index i has row i + 1."""
    actions: tuple[str, ...]
    surfaces: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.item_keys.dtype != np.uint64 or not bool(np.all(self.item_keys[1:] > self.item_keys[:-1])):
            raise ValueError("item keys are not strictly increasing 64-bit keys: sort them and drop duplicates")
        for what, names in (("action types", self.actions), ("surfaces", self.surfaces)):
            if len({name_code(name) for name in names} - {0}) != len(names):
                raise ValueError(f"two {what} share a code, or one is empty or repeated: {names}; rename one")

    def item_rows(self, keys: U64) -> I64:
        """Return the rows of item keys [...], `UNKNOWN` for keys outside the vocabulary.

        >>> Vocabularies(np.array([3, 7], np.uint64), (), ()).item_rows(np.array([7, 5, 3], np.uint64)).tolist()
        [2, 0, 1]
        """
        if not len(self.item_keys):
            return np.zeros(keys.shape, np.int64)
        at = np.minimum(np.searchsorted(self.item_keys, keys), len(self.item_keys) - 1)
        return np.where(self.item_keys[at] == keys, at + 1, UNKNOWN).astype(np.int64)


def code_rows(names: Sequence[str]) -> I64:
    """Return the table [65,536] from the code of a name to its row, `UNKNOWN` for all other codes."""
    rows = np.zeros(1 << 16, np.int64)
    rows[[name_code(name) for name in names]] = np.arange(1, len(names) + 1)
    return rows


@dataclass(frozen=True, slots=True)
class Features:
    """Model inputs as int64 tensors of one common shape [...]."""

    item: Tensor
    action: Tensor
    surface: Tensor
    duration_ms: Tensor
    time_ms: Tensor
    """Event time."""
    gap_ms: Tensor
    """Event time since the user's previous action; 0 for the oldest kept action."""
    position: Tensor
    """Index of the action, counted from the user's first action ever."""

    def to(self, device: torch.device) -> Features:
        """Return the features on a device."""
        return Features(*(getattr(self, name).to(device, non_blocking=True) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Tokens:
    """The columns of `Features` for N actions of one or more users, as numpy arrays [N]."""

    item: I64
    action: I64
    surface: I64
    duration_ms: I64
    time_ms: I64
    gap_ms: I64
    position: I64

    def features(self, rows: I64 | None = None) -> Features:
        """Return all rows, or `rows` of any shape; a negative row is padding: an unknown action at time 0."""
        if rows is None:
            return Features(*(torch.from_numpy(getattr(self, name)) for name in self.__slots__))
        padding = rows < 0
        at = np.where(padding, 0, rows) if padding.any() else rows

        def column(values: I64) -> Tensor:
            taken = values.take(at)
            if at is not rows:
                taken[padding] = 0
            return torch.from_numpy(taken)

        return Features(*(column(getattr(self, name)) for name in self.__slots__))


class Tokenizer:
    """Tokenizes actions with the vocabularies of one release; the lookup tables are built once."""

    def __init__(self, vocabularies: Vocabularies) -> None:
        self.vocabularies = vocabularies
        self._action_rows = code_rows(vocabularies.actions)
        self._surface_rows = code_rows(vocabularies.surfaces)

    def tokenize(self, actions: Actions, starts: I64, positions: I64, rows: I64 | None = None) -> Tokens:
        """Return the tokens of N actions, ordered by user and then oldest first, or only of R selected `rows`.

        `starts` [U + 1] bounds the users as in `SequenceBatch`; `positions` [N], or [R] with `rows`, counts the actions
        of each user from the first ever. Gaps are at least 0, because rows are in event-time order.
        """
        time_ms = actions["timestamp_ms"].astype(np.int64)
        gap_ms = gaps_ms(time_ms, starts)
        if rows is not None:
            actions, time_ms, gap_ms = actions.take(rows), time_ms.take(rows), gap_ms.take(rows)
        return Tokens(
            item=self.vocabularies.item_rows(actions["item"]),
            action=self._action_rows[actions["action"]],
            surface=self._surface_rows[actions["surface"]],
            duration_ms=actions["duration_ms"].astype(np.int64),
            time_ms=time_ms,
            gap_ms=gap_ms,
            position=np.asarray(positions, np.int64),
        )


def gaps_ms(time_ms: I64, starts: I64) -> I64:
    """Return the event time [N] since the previous row, 0 at the first row of each user.

    >>> gaps_ms(np.array([5, 9, 20, 3]), np.array([0, 3, 4])).tolist()
    [0, 4, 11, 0]
    """
    gaps = np.zeros(len(time_ms), np.int64)
    np.subtract(time_ms[1:], time_ms[:-1], out=gaps[1:])
    gaps[starts[:-1][np.diff(starts) > 0]] = 0  # an empty user's start is the first row of another user, or N
    return np.maximum(gaps, 0, out=gaps)


def sequence_positions(starts: I64, counts: I64) -> I64:
    """Return the positions [N] of the rows of a `SequenceBatch`: the newest row of user u has position counts[u] - 1.

    Two users with 3 and 1 kept rows, of 10 and 1 actions:

    >>> sequence_positions(np.array([0, 3, 4]), np.array([10, 1])).tolist()
    [7, 8, 9, 0]
    """
    lengths = np.diff(starts)
    return np.arange(starts[-1], dtype=np.int64) - np.repeat(starts[1:] - counts, lengths)


def padded_rows(starts: I64, *, length: int | None = None) -> I64:
    """Return the rows [U, L] of each user's sequence, oldest first, padded with -1; L is the longest or `length`.

    >>> padded_rows(np.array([0, 3, 4])).tolist()
    [[0, 1, 2], [3, -1, -1]]
    """
    lengths = np.diff(starts)
    width = int(lengths.max(initial=0)) if length is None else length
    at = np.arange(width, dtype=np.int64)  # [L]
    return np.where(at < lengths[:, None], starts[:-1, None] + at, -1)
