"""From action columns to what a model reads: the same function in training, in batch and in the stream.

`tokenize` looks ids up in the release's vocabularies and finds the gap to the previous action of the same user;
`Tokens.features` gathers any rows into integer tensors. All time arithmetic stays in integer milliseconds here: the
model reduces it modulo its periods in float64 before anything becomes float32.
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
"""Changes whenever the meaning of a column below does; a release trained with another version is refused."""

UNKNOWN = 0
"""The row that every unknown item, action type or surface shares."""


@dataclass(frozen=True, slots=True)
class Vocabularies:
    """What a release knows. Row 0 of each is shared by everything unknown; known ids follow in the order given."""

    item_keys: U64
    """[I] strictly increasing; the key at index i has row i + 1."""
    actions: tuple[str, ...]
    surfaces: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.item_keys.dtype != np.uint64 or not bool(np.all(self.item_keys[1:] > self.item_keys[:-1])):
            raise ValueError("item keys are not strictly increasing 64-bit keys: sort them and drop duplicates")
        for what, names in (("action types", self.actions), ("surfaces", self.surfaces)):
            if len({name_code(name) for name in names} - {0}) != len(names):
                raise ValueError(f"two {what} share a code, or one is empty or repeated: {names}; rename one")

    def item_rows(self, keys: U64) -> I64:
        """Rows of item keys, `UNKNOWN` for those outside the vocabulary; shape kept."""
        if not len(self.item_keys):
            return np.zeros(keys.shape, np.int64)
        at = np.minimum(np.searchsorted(self.item_keys, keys), len(self.item_keys) - 1)
        return np.where(self.item_keys[at] == keys, at + 1, UNKNOWN).astype(np.int64)


def code_rows(names: Sequence[str]) -> I64:
    """[65,536] table from the code of a name to its row, `UNKNOWN` elsewhere."""
    rows = np.zeros(1 << 16, np.int64)
    rows[[name_code(name) for name in names]] = np.arange(1, len(names) + 1)
    return rows


@dataclass(frozen=True, slots=True)
class Features:
    """Tokens as int64 tensors of one common shape [...]: what a model's `inputs` takes."""

    item: Tensor
    action: Tensor
    surface: Tensor
    duration_ms: Tensor
    time_ms: Tensor
    """Event time."""
    gap_ms: Tensor
    """Event time since the user's previous action; 0 for the first row kept."""
    position: Tensor
    """Counted from the user's first action ever."""

    def to(self, device: torch.device) -> Features:
        return Features(*(getattr(self, name).to(device, non_blocking=True) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Tokens:
    """The columns of `Features` for N actions of one or many users, as numpy arrays [N]."""

    item: I64
    action: I64
    surface: I64
    duration_ms: I64
    time_ms: I64
    gap_ms: I64
    position: I64

    def features(self, rows: I64 | None = None) -> Features:
        """All rows, or those named in any shape; a negative one is padding and reads as an unknown action at time 0."""
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
    """Binds `tokenize` to the vocabularies of one release; the look-up tables are built once."""

    def __init__(self, vocabularies: Vocabularies) -> None:
        self.vocabularies = vocabularies
        self._action_rows = code_rows(vocabularies.actions)
        self._surface_rows = code_rows(vocabularies.surfaces)

    def tokenize(self, actions: Actions, starts: I64, positions: I64, rows: I64 | None = None) -> Tokens:
        """Columns of N actions, users one after another, each oldest first, or of R `rows` of them alone.

        `starts` [U + 1] bounds the users as in `SequenceBatch`; `positions` [N] or [R] counts each user's actions from
        the first ever. A late clock cannot make a gap negative: rows are in event-time order, and a gap is at least 0.
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
    """[N] event time since the row before, 0 at the first row of each user."""
    gaps = np.zeros(len(time_ms), np.int64)
    np.subtract(time_ms[1:], time_ms[:-1], out=gaps[1:])
    gaps[starts[:-1][np.diff(starts) > 0]] = 0
    return np.maximum(gaps, 0, out=gaps)


def sequence_positions(starts: I64, counts: I64) -> I64:
    """[N] positions of the rows of a `SequenceBatch`: the newest row of user u has position counts[u] - 1."""
    lengths = np.diff(starts)
    return np.arange(starts[-1], dtype=np.int64) - np.repeat(starts[1:] - counts, lengths)


def padded_rows(starts: I64, *, length: int | None = None) -> I64:
    """[U, L] row numbers of each user's sequence, oldest first, -1 behind its end; L is the longest or `length`."""
    lengths = np.diff(starts)
    width = int(lengths.max(initial=0)) if length is None else length
    at = np.arange(width, dtype=np.int64)
    return np.where(at < lengths[:, None], starts[:-1, None] + at, -1)
