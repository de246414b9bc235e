"""Event logs as sorted columns: read from Parquet or CSV, cut by time and by user.

A log is sorted by user, then event time, ties in file order: the order in which the stream would have applied it. Ids
are hashed like the stream hashes them, once for each distinct id. Training takes any `LogParts`: a log in memory, or
one that is read shard by shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from encoder.actions.columns import ACTION_DTYPE, Actions, item_key, name_code
from encoder.arrays import F64, I64, U64, Bool
from encoder.errors import StreamformerError
from encoder.features import Tokenizer, Tokens, Vocabularies

DAY_MS = 86_400_000


class LogError(StreamformerError):
    """An event log that cannot be used; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class LogColumns:
    """Names of the columns of a file; an empty name means that the file has none."""

    user: str = "user_id"
    item: str = "item_id"
    action: str = "action"
    timestamp: str = "timestamp_ms"
    surface: str = ""
    duration_ms: str = ""
    time_unit: Literal["ms", "s"] = "ms"

    @property
    def named(self) -> list[str]:
        """The columns that the file has, each once."""
        names = (self.user, self.item, self.action, self.timestamp, self.surface, self.duration_ms)
        return list(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True, slots=True)
class ItemCounts:
    """How often items are acted on."""

    keys: U64
    """[I] strictly increasing."""
    counts: I64
    """[I]."""

    def __add__(self, other: ItemCounts) -> ItemCounts:
        keys, inverse = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        counts = np.bincount(inverse, np.concatenate([self.counts, other.counts]), minlength=len(keys))
        return ItemCounts(keys, counts.astype(np.int64))

    @staticmethod
    def total(parts: Iterable[ItemCounts]) -> ItemCounts:
        return reduce(ItemCounts.__add__, parts)

    def frequent(self, items_min: int) -> U64:
        """Keys of the items that occur at least `items_min` times."""
        return self.keys[self.counts >= items_min]


class LogParts(Protocol):
    """A log that is trained on one part after another: whole users each, no user in two of them."""

    @property
    def parts(self) -> int: ...

    def part(self, number: int) -> ActionLog:
        """Part `number`, from 0, read when asked for."""
        ...

    def item_counts(self, names: tuple[str, ...] = ()) -> ItemCounts:
        """Of all parts: actions of the named types, of all types if none is named."""
        ...

    def vocabularies(self, *, items_min: int = 1) -> Vocabularies:
        """Of all parts: everything that occurs, items at least `items_min` times."""
        ...

    def content(self) -> Iterator[bytes]:
        """Bytes that tell this log from another one."""
        ...


@dataclass(frozen=True, slots=True)
class ActionLog:
    """Actions of U users, one user after another, each oldest first."""

    users: npt.NDArray[np.str_]
    """[U] user ids."""
    starts: I64
    """[U + 1]: user u owns rows starts[u] to starts[u + 1]."""
    actions: Actions
    """[N] of ACTION_DTYPE."""
    action_names: tuple[str, ...]
    """Names of the action types that occur, most frequent first."""
    surface_names: tuple[str, ...]
    item_ids: npt.NDArray[np.str_]
    """Ids of the items that occur, in no particular order."""

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def user_of_row(self) -> I64:
        """[N] index of each row's user."""
        return np.repeat(np.arange(len(self.users)), np.diff(self.starts))

    @property
    def parts(self) -> int:
        """A log in memory is its own only part."""
        return 1

    def part(self, number: int) -> ActionLog:
        """The log itself."""
        return self

    def content(self) -> Iterator[bytes]:
        """Every action, and whose it is."""
        yield self.actions.tobytes()
        yield self.starts.tobytes()

    def select(self, rows: Bool) -> ActionLog:
        """The log of the rows [N] that are True; users keep their place, also those left without actions."""
        starts = np.concatenate([[0], np.cumsum(rows)])[self.starts]
        return ActionLog(self.users, starts, self.actions[rows], self.action_names, self.surface_names, self.item_ids)

    def with_frequent_items(self, items_min: int) -> ActionLog:
        """The actions on items that occur at least `items_min` times."""
        return self.with_items(self.item_counts().frequent(items_min)) if items_min > 1 else self

    def with_items(self, keys: U64) -> ActionLog:
        """The actions on items with one of the keys."""
        return self.select(np.isin(self.actions["item"], keys))

    def before(self, time_ms: int) -> ActionLog:
        """Actions with an event time before `time_ms`."""
        return self.select(self.actions["timestamp_ms"] < time_ms)

    def quantile_ms(self, fraction: float) -> int:
        """The event time before which `fraction` of the actions lie."""
        return int(np.quantile(self.actions["timestamp_ms"], fraction))

    def vocabularies(self, *, items_min: int = 1) -> Vocabularies:
        """Everything that occurs, items at least `items_min` times."""
        return Vocabularies(self.item_counts().frequent(items_min), self.action_names, self.surface_names)

    def item_counts(self, names: tuple[str, ...] = ()) -> ItemCounts:
        """How often each item is acted on by the named types, by all types if none is named."""
        items = self.actions["item"]
        return ItemCounts(*np.unique(items[self.is_of(names)] if names else items, return_counts=True))

    def is_of(self, names: tuple[str, ...]) -> Bool:
        """[N] whether an action is of one of the named types; all are if none is named."""
        if not names:
            return np.ones(len(self), np.bool_)
        return np.isin(self.actions["action"], [name_code(name) for name in names])

    def tokens(self, vocabularies: Vocabularies) -> Tokens:
        """What a model reads of every action, positions counted from the log's first action of each user."""
        positions = np.arange(len(self)) - np.repeat(self.starts[:-1], np.diff(self.starts))
        return Tokenizer(vocabularies).tokenize(self.actions, self.starts, positions)


def read_log(path: Path, columns: LogColumns) -> ActionLog:
    """Read a `.parquet`, `.csv` or `.csv.gz` file, or the Parquet files of a folder; raises `LogError`."""
    with readable(path):
        table = _read_table(path, columns.named)
    if table.num_rows == 0:
        raise LogError(f"event log is empty: {path}; name a file with actions")
    return log_from_table(table, columns)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What goes wrong inside is told as a `LogError` of the log at `path`."""
    try:
        yield
    except (OSError, pa.ArrowException, KeyError) as error:
        detail = " ".join(str(error).split())
        raise LogError(f"event log cannot be read: {path} ({detail}); check the path and the column names") from error


def parquet_files(path: Path) -> list[Path]:
    """The file itself, or all files `*.parquet` below a folder by name; none for another kind of file."""
    if path.is_dir():
        return sorted(path.rglob("*.parquet"))
    return [path] if path.suffix == ".parquet" else []


def _read_table(path: Path, names: list[str]) -> pa.Table:
    if files := parquet_files(path):
        return pyarrow.parquet.read_table(files, columns=names)
    return pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(include_columns=names))


def log_from_table(table: pa.Table, columns: LogColumns) -> ActionLog:
    """Sort and hash an Arrow table that has the named columns."""
    rows = np.zeros(table.num_rows, ACTION_DTYPE)
    users, user_of_row = distinct(table, columns.user)
    items, item_of_row = distinct(table, columns.item)
    rows["item"] = np.array([item_key(item) for item in items], np.uint64)[item_of_row]
    rows["timestamp_ms"] = times_ms(table, columns)
    action_names, rows["action"] = _codes(table, columns.action)
    surface_names, rows["surface"] = _codes(table, columns.surface)
    if columns.duration_ms:
        duration = pc.fill_null(pc.cast(table[columns.duration_ms], pa.float64()), 0).to_numpy()
        rows["duration_ms"] = np.clip(duration, 0, np.iinfo(np.uint32).max)
    order = np.lexsort((rows["timestamp_ms"], user_of_row))  # stable: ties keep file order
    starts = np.searchsorted(user_of_row[order], np.arange(len(users) + 1))
    return ActionLog(np.array(users), starts, rows[order], action_names, surface_names, np.array(items))


def distinct(table: pa.Table, name: str) -> tuple[list[str], I64]:
    """Distinct values as text, in order of first appearance, and the index of each row's value. Raises `LogError`."""
    column = table[name].combine_chunks()
    if column.null_count:
        raise LogError(f"column {name} has {column.null_count} missing values; drop those rows")
    encoded: Any = pc.dictionary_encode(pc.cast(column, pa.string()))
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def _codes(table: pa.Table, name: str) -> tuple[tuple[str, ...], npt.NDArray[np.uint16]]:
    """Names that occur, most frequent first, and the code of each row; nothing where the file has no such column."""
    if not name:
        return (), np.zeros(table.num_rows, np.uint16)
    values, at = distinct(table, name)
    codes = np.array([name_code(value) for value in values], np.uint16)
    order: Sequence[int] = np.argsort(-np.bincount(at, minlength=len(values)), kind="stable").tolist()
    return tuple(values[i] for i in order if values[i]), codes[at]


def times_ms(table: pa.Table, columns: LogColumns) -> I64:
    """[N] event times. Raises `LogError`."""
    column = table[columns.timestamp]
    if column.null_count:
        raise LogError(f"column {columns.timestamp} has {column.null_count} missing values; drop those rows")
    if pa.types.is_timestamp(column.type):
        whole: I64 = pc.cast(column, pa.timestamp("ms"), safe=False).cast(pa.int64()).to_numpy()
        return whole
    try:
        values: F64 = pc.cast(column, pa.float64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise LogError(f"column {columns.timestamp} holds no times ({error}); give epoch seconds or ms") from error
    return np.rint(values * (1_000 if columns.time_unit == "s" else 1)).astype(np.int64)
