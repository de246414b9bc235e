"""Event logs as sorted columns: read from Parquet or CSV, cut by time and by user.

A log is sorted by user, then event time, ties in file order: the order in which the stream would have applied it. Ids
are hashed like the stream hashes them, once for each distinct id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from encoder.actions import ACTION_DTYPE, Actions, item_key, name_code
from encoder.features import Ints, Tokenizer, Tokens, Vocabularies

DAY_MS = 86_400_000


class LogError(ValueError):
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


@dataclass(frozen=True, slots=True)
class ActionLog:
    """Actions of U users, one user after another, each oldest first."""

    users: npt.NDArray[np.str_]
    """[U] user ids."""
    starts: Ints
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
    def user_of_row(self) -> Ints:
        """[N] index of each row's user."""
        return np.repeat(np.arange(len(self.users)), np.diff(self.starts))

    def select(self, rows: npt.NDArray[np.bool_]) -> ActionLog:
        """The log of the rows [N] that are True; users keep their place, also those left without actions."""
        starts = np.concatenate([[0], np.cumsum(rows)])[self.starts]
        return ActionLog(self.users, starts, self.actions[rows], self.action_names, self.surface_names, self.item_ids)

    def with_frequent_items(self, items_min: int) -> ActionLog:
        """The actions on items that occur at least `items_min` times."""
        _, inverse, counts = np.unique(self.actions["item"], return_inverse=True, return_counts=True)
        return self.select(counts[inverse] >= items_min) if items_min > 1 else self

    def before(self, time_ms: int) -> ActionLog:
        """Actions with an event time before `time_ms`."""
        return self.select(self.actions["timestamp_ms"] < time_ms)

    def quantile_ms(self, fraction: float) -> int:
        """The event time before which `fraction` of the actions lie."""
        return int(np.quantile(self.actions["timestamp_ms"], fraction))

    def vocabularies(self, *, items_min: int = 1) -> Vocabularies:
        """Everything that occurs, items at least `items_min` times."""
        keys, counts = np.unique(self.actions["item"], return_counts=True)
        return Vocabularies(keys[counts >= items_min], self.action_names, self.surface_names)

    def tokens(self, vocabularies: Vocabularies) -> Tokens:
        """What a model reads of every action, positions counted from the log's first action of each user."""
        positions = np.arange(len(self)) - np.repeat(self.starts[:-1], np.diff(self.starts))
        return Tokenizer(vocabularies).tokenize(self.actions, self.starts, positions)


def read_log(path: Path, columns: LogColumns) -> ActionLog:
    """Read a `.parquet`, `.csv` or `.csv.gz` file; raises `LogError`."""
    names = [columns.user, columns.item, columns.action, columns.timestamp, columns.surface, columns.duration_ms]
    try:
        table = _read_table(path, [name for name in names if name])
    except (OSError, pa.ArrowException, KeyError) as error:
        detail = " ".join(str(error).split())
        raise LogError(f"event log cannot be read: {path} ({detail}); check the path and the column names") from error
    if table.num_rows == 0:
        raise LogError(f"event log is empty: {path}; name a file with actions")
    return log_from_table(table, columns)


def _read_table(path: Path, names: list[str]) -> pa.Table:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path, columns=names)
    return pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(include_columns=names))


def log_from_table(table: pa.Table, columns: LogColumns) -> ActionLog:
    """Sort and hash an Arrow table that has the named columns."""
    rows = np.zeros(table.num_rows, ACTION_DTYPE)
    users, user_of_row = _distinct(table, columns.user)
    items, item_of_row = _distinct(table, columns.item)
    rows["item"] = np.array([item_key(item) for item in items], np.uint64)[item_of_row]
    rows["timestamp_ms"] = _times_ms(table, columns)
    action_names, rows["action"] = _codes(table, columns.action)
    surface_names, rows["surface"] = _codes(table, columns.surface)
    if columns.duration_ms:
        duration = pc.fill_null(pc.cast(table[columns.duration_ms], pa.float64()), 0).to_numpy()
        rows["duration_ms"] = np.clip(duration, 0, np.iinfo(np.uint32).max)
    order = np.lexsort((rows["timestamp_ms"], user_of_row))  # stable: ties keep file order
    starts = np.searchsorted(user_of_row[order], np.arange(len(users) + 1))
    return ActionLog(np.array(users), starts, rows[order], action_names, surface_names, np.array(items))


def _distinct(table: pa.Table, name: str) -> tuple[list[str], Ints]:
    """Distinct values as text, in order of first appearance, and the index of each row's value."""
    column = table[name].combine_chunks()
    if column.null_count:
        raise LogError(f"column {name} has {column.null_count} missing values; drop those rows")
    encoded: Any = pc.dictionary_encode(pc.cast(column, pa.string()))
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def _codes(table: pa.Table, name: str) -> tuple[tuple[str, ...], npt.NDArray[np.uint16]]:
    """Names that occur, most frequent first, and the code of each row; nothing where the file has no such column."""
    if not name:
        return (), np.zeros(table.num_rows, np.uint16)
    values, at = _distinct(table, name)
    codes = np.array([name_code(value) for value in values], np.uint16)
    order: Sequence[int] = np.argsort(-np.bincount(at, minlength=len(values)), kind="stable").tolist()
    return tuple(values[i] for i in order if values[i]), codes[at]


def _times_ms(table: pa.Table, columns: LogColumns) -> Ints:
    column = table[columns.timestamp]
    if column.null_count:
        raise LogError(f"column {columns.timestamp} has {column.null_count} missing values; drop those rows")
    if pa.types.is_timestamp(column.type):
        whole: Ints = pc.cast(column, pa.timestamp("ms"), safe=False).cast(pa.int64()).to_numpy()
        return whole
    try:
        values: npt.NDArray[np.float64] = pc.cast(column, pa.float64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise LogError(f"column {columns.timestamp} holds no times ({error}); give epoch seconds or ms") from error
    return np.rint(values * (1_000 if columns.time_unit == "s" else 1)).astype(np.int64)
