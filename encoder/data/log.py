"""Action logs as sorted columns: read from Parquet, CSV or JSON lines, selected by time and by user.

A log is sorted by user, then by event time, with ties in file order: the order in which the stream would have applied
the actions. Ids are hashed as in the stream, once per distinct id. If the log has event ids, an action that repeats an
id of its user is dropped, and the first in the file stays; the stream compares with the kept actions only. Training
takes any `LogParts`: a log in memory, or one that is read shard by shard.

Shapes: N actions, U users, I items.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from encoder.actions.columns import ACTION_DTYPE, Actions, item_key, name_code
from encoder.arrays import F64, I64, U64, Bool
from encoder.errors import StreamformerError
from encoder.features import Tokenizer, Tokens, Vocabularies

DAY_MS = 86_400_000
NUMBER = r"^\s*([+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)?\s*$"
"""Texts that are numbers, or empty."""
JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")


class LogError(StreamformerError):
    """A log that cannot be used; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class LogColumns:
    """Column names of a file; an empty name means that the file has no such column."""

    user: str = "user_id"
    item: str = "item_id"
    action: str = "action"
    timestamp: str = "timestamp_ms"
    surface: str = ""
    duration_ms: str = ""
    time_unit: Literal["ms", "s"] = "ms"
    value: str = ""
    """A number of the action, such as a price, a rating or a quantity; read for features only."""
    event_id: str = ""

    @property
    def named(self) -> list[str]:
        """Names of the columns that the file has, without duplicates."""
        names = (
            self.user,
            self.item,
            self.action,
            self.timestamp,
            self.surface,
            self.duration_ms,
            self.value,
            self.event_id,
        )
        return list(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True, slots=True)
class ItemCounts:
    """Number of actions on each item."""

    keys: U64
    """[I] item keys, strictly increasing."""
    counts: I64
    """[I] number of actions."""

    def __add__(self, other: ItemCounts) -> ItemCounts:
        keys, inverse = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        counts = np.bincount(inverse, np.concatenate([self.counts, other.counts]), minlength=len(keys))
        return ItemCounts(keys, counts.astype(np.int64))

    @staticmethod
    def total(parts: Iterable[ItemCounts]) -> ItemCounts:
        """Return the sum of all parts."""
        return reduce(ItemCounts.__add__, parts)

    def frequent(self, items_min: int) -> U64:
        """Return the keys of the items that occur at least `items_min` times."""
        return self.keys[self.counts >= items_min]


class LogParts(Protocol):
    """A log that is trained on part by part; each user is in exactly one part."""

    @property
    def parts(self) -> int:
        """Number of parts."""
        ...

    def part(self, number: int) -> ActionLog:
        """Return part `number`, from 0, reading it if necessary."""
        ...

    def item_counts(self, names: tuple[str, ...] = ()) -> ItemCounts:
        """Count the actions of the named types, or of all types if none is named, over all parts."""
        ...

    def vocabularies(self, *, items_min: int = 1) -> Vocabularies:
        """Return the vocabularies of all parts; items must occur at least `items_min` times."""
        ...

    def content(self) -> Iterator[bytes]:
        """Yield bytes that identify the content of the log, to be hashed."""
        ...


@dataclass(frozen=True, slots=True)
class ActionLog:
    """Actions of U users, one user after another, each oldest first."""

    users: npt.NDArray[np.str_]
    """[U] user ids."""
    starts: I64
    """[U + 1]: user u owns rows starts[u] to starts[u + 1]."""
    actions: Actions
    """[N] actions."""
    action_names: tuple[str, ...]
    """Names of the action types that occur, most frequent first."""
    surface_names: tuple[str, ...]
    """Names of the surfaces that occur, most frequent first."""
    item_ids: npt.NDArray[np.str_]
    """Ids of the items that occur, in no particular order."""
    values: F64 | None = None
    """[N] number of each action, NaN where it has none; None if the log has no such column."""
    repeats: int = 0
    """Number of actions that were dropped because they repeat an event id of their user."""

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def user_of_row(self) -> I64:
        """[N] index of the user of each row."""
        return np.repeat(np.arange(len(self.users)), np.diff(self.starts))

    @property
    def parts(self) -> int:
        """Number of parts: a log in memory is its own only part."""
        return 1

    def part(self, number: int) -> ActionLog:
        """Return the log itself."""
        return self

    def content(self) -> Iterator[bytes]:
        """Yield the actions and the bounds of the users."""
        yield self.actions.tobytes()
        yield self.starts.tobytes()

    def select(self, rows: Bool) -> ActionLog:
        """Return the log of the rows where `rows` [N] is True; users keep their index, even without actions.

        A user that began at row s begins at the number of selected rows before s:

            rows                     1 0 1 | 1 0 | 0 1        starts [0, 3, 5, 7]
            0 and the running sum  0 1 1 2   3 3   3 4        starts [0, 2, 3, 4]
        """
        starts = np.concatenate([[0], np.cumsum(rows)])[self.starts]
        values = None if self.values is None else self.values[rows]
        return replace(self, starts=starts, actions=self.actions[rows], values=values)

    def with_frequent_items(self, items_min: int) -> ActionLog:
        """Return the actions on items that occur at least `items_min` times."""
        return self.with_items(self.item_counts().frequent(items_min)) if items_min > 1 else self

    def with_items(self, keys: U64) -> ActionLog:
        """Return the actions on the items with these keys."""
        return self.select(np.isin(self.actions["item"], keys))

    def before(self, time_ms: int) -> ActionLog:
        """Return the actions with an event time before `time_ms`."""
        return self.select(self.actions["timestamp_ms"] < time_ms)

    def quantile_ms(self, fraction: float) -> int:
        """Return the event time before which `fraction` of the actions happened."""
        return int(np.quantile(self.actions["timestamp_ms"], fraction))

    def vocabularies(self, *, items_min: int = 1) -> Vocabularies:
        """Return the vocabularies of the log; items must occur at least `items_min` times."""
        return Vocabularies(self.item_counts().frequent(items_min), self.action_names, self.surface_names)

    def item_counts(self, names: tuple[str, ...] = ()) -> ItemCounts:
        """Count the actions on each item, of the named types or of all types if none is named."""
        items = self.actions["item"]
        return ItemCounts(*np.unique(items[self.is_of(names)] if names else items, return_counts=True))

    def is_of(self, names: tuple[str, ...]) -> Bool:
        """Return whether each action [N] has one of the named types; with no names, all have."""
        if not names:
            return np.ones(len(self), np.bool_)
        return np.isin(self.actions["action"], [name_code(name) for name in names])

    def tokens(self, vocabularies: Vocabularies) -> Tokens:
        """Return the model inputs of every action; positions count from each user's first action in the log."""
        positions = np.arange(len(self)) - np.repeat(self.starts[:-1], np.diff(self.starts))
        return Tokenizer(vocabularies).tokenize(self.actions, self.starts, positions)


def read_log(path: Path, columns: LogColumns) -> ActionLog:
    """Read a `.parquet`, `.csv`, `.csv.gz` or `.jsonl` file, or the Parquet files of a folder. Raises `LogError`."""
    with readable(path):
        table = _read_table(path, columns)
    if table.num_rows == 0:
        raise LogError(f"event log is empty: {path}; name a file with actions")
    return log_from_table(table, columns)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn errors raised inside this context into a `LogError` about the log at `path`."""
    try:
        yield
    except (OSError, pa.ArrowException, KeyError) as error:
        detail = " ".join(str(error).split())
        raise LogError(f"event log cannot be read: {path} ({detail}); check the path and the column names") from error


def parquet_files(path: Path) -> list[Path]:
    """Return the file itself, or all `*.parquet` files below a folder in order of name; none for another file type."""
    if path.is_dir():
        return sorted(path.rglob("*.parquet"))
    return [path] if path.suffix == ".parquet" else []


def _read_table(path: Path, columns: LogColumns) -> pa.Table:
    if files := parquet_files(path):
        return pyarrow.parquet.read_table(files, columns=columns.named)
    if path.name.endswith(JSON_LINES):
        return pyarrow.json.read_json(path).select(columns.named)
    options = pyarrow.csv.ConvertOptions(include_columns=columns.named)
    if columns.value:  # a NaN in a file would be read as an empty field
        options.null_values = [text for text in options.null_values if "nan" not in text.lower()]
    return pyarrow.csv.read_csv(path, convert_options=options)


def log_from_table(table: pa.Table, columns: LogColumns) -> ActionLog:
    """Return the log of an Arrow table: ids hashed, rows sorted."""
    rows = np.zeros(table.num_rows, ACTION_DTYPE)
    users, user_of_row = distinct(table, columns.user)
    items, item_of_row = distinct(table, columns.item)
    rows["item"] = np.array([item_key(item) for item in items], np.uint64)[item_of_row]
    rows["timestamp_ms"] = times_ms(table, columns)
    action_names, rows["action"] = _codes(table, columns.action)
    surface_names, rows["surface"] = _codes(table, columns.surface)
    if columns.duration_ms:
        duration = np.nan_to_num(numbers(table, columns.duration_ms))
        rows["duration_ms"] = np.clip(duration, 0, np.iinfo(np.uint32).max)
    values = numbers(table, columns.value) if columns.value else None
    order = np.lexsort((rows["timestamp_ms"], user_of_row))  # stable: ties keep file order
    if columns.event_id:
        rows["event_id"] = _event_keys(table, columns.event_id)
        order = order[~_repeats(user_of_row, rows["event_id"])[order]]
    return ActionLog(
        users=np.array(users),
        starts=np.searchsorted(user_of_row[order], np.arange(len(users) + 1)),
        actions=rows[order],
        action_names=action_names,
        surface_names=surface_names,
        item_ids=np.array(items),
        values=None if values is None else values[order],
        repeats=len(rows) - len(order),
    )


def distinct(table: pa.Table, name: str) -> tuple[list[str], I64]:
    """Return the distinct values as text, by first appearance, and the index [N] of each row's value.

    Raises `LogError` if a value is missing.
    """
    column = table[name].combine_chunks()
    if column.null_count:
        raise LogError(f"column {name} has {column.null_count} missing values; drop those rows")
    encoded: Any = pc.dictionary_encode(pc.cast(column, pa.string()))
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def _codes(table: pa.Table, name: str) -> tuple[tuple[str, ...], npt.NDArray[np.uint16]]:
    """Return the names that occur, most frequent first, and the code [N] of each row; none and 0 without a column."""
    if not name:
        return (), np.zeros(table.num_rows, np.uint16)
    values, at = distinct(table, name)
    codes = np.array([name_code(value) for value in values], np.uint16)
    order: Sequence[int] = np.argsort(-np.bincount(at, minlength=len(values)), kind="stable").tolist()
    return tuple(values[i] for i in order if values[i]), codes[at]


def times_ms(table: pa.Table, columns: LogColumns) -> I64:
    """Return the event times [N]. Raises `LogError` if one is missing or not a time."""
    column = table[columns.timestamp]
    if column.null_count:
        raise LogError(f"column {columns.timestamp} has {column.null_count} missing values; drop those rows")
    if pa.types.is_timestamp(column.type):
        whole: I64 = pc.cast(column, pa.timestamp("ms"), safe=False).cast(pa.int64()).to_numpy()
        return whole
    try:
        values: F64 = pc.cast(column, pa.float64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise LogError(
            f"column {columns.timestamp} has values that are not times ({error}); give epoch seconds or ms"
        ) from error
    if not np.isfinite(values).all():
        raise LogError(f"column {columns.timestamp} has values that are not times (NaN); give epoch seconds or ms")
    return np.rint(values * (1_000 if columns.time_unit == "s" else 1)).astype(np.int64)


def numbers(table: pa.Table, name: str, first_row: int = 1) -> F64:
    """Return the numbers [N] of a column, NaN where there is none.

    Raises `LogError` if a value is text, NaN or infinite; `first_row` is the number of the table's first row.
    """
    column = table[name].combine_chunks()
    kind = column.type
    is_given = pc.is_valid(column).to_numpy(zero_copy_only=False)
    is_bad = is_given
    if pa.types.is_null(kind) or any(is_kind(kind) for is_kind in (pa.types.is_integer, pa.types.is_decimal)):
        is_bad = np.zeros(len(column), np.bool_)
    elif pa.types.is_floating(kind):
        is_bad = is_given & ~pc.fill_null(pc.is_finite(column), True).to_numpy(zero_copy_only=False)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        is_text = ~pc.fill_null(pc.match_substring_regex(column, NUMBER), True).to_numpy(zero_copy_only=False)
        is_bad = is_text if is_text.any() else is_given  # numbers as text are text
    if is_bad.any():
        first, count = int(is_bad.argmax()), int(is_bad.sum())
        which = f"row {first_row + first}" if count == 1 else f"{count} rows, the first of which is {first_row + first}"
        raise LogError(
            f"column {name} is not a finite number in {which} (rows count from 1): {column[first].as_py()!r}; "
            "write numbers as numbers, and leave the field empty where there is none"
        )
    found: F64 = pc.fill_null(pc.cast(column, pa.float64(), safe=False), np.nan).to_numpy(zero_copy_only=False)
    return found


def _event_keys(table: pa.Table, name: str) -> U64:
    """Return the key [N] of each row's event id, 0 where there is none."""
    encoded: Any = pc.dictionary_encode(pc.fill_null(pc.cast(table[name].combine_chunks(), pa.string()), ""))
    keys: U64 = np.array([item_key(text) if text else 0 for text in encoded.dictionary.to_pylist()], np.uint64)
    of_row: U64 = keys[encoded.indices.to_numpy()]
    return of_row


def _repeats(user_of_row: I64, ids: U64) -> Bool:
    """Return which rows [N] repeat an event id of their user that is in an earlier row; 0 is no id."""
    repeats = np.zeros(len(ids), np.bool_)
    with_id = np.flatnonzero(ids)
    with_id = with_id[np.lexsort((ids[with_id], user_of_row[with_id]))]  # stable: equal ids stay in file order
    before, after = with_id[:-1], with_id[1:]
    repeats[after] = (ids[before] == ids[after]) & (user_of_row[before] == user_of_row[after])
    return repeats
