"""A log of actions in memory, as columns, ready to be produced; it is read from Parquet or CSV, or made of a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from xxhash import xxh3_64_hexdigest

from encoder.arrays import I64
from infra.errors import InfraError


class LogUnreadable(InfraError):
    """The file is not a log that can be replayed."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of a file's columns; those with the default "" are optional, and "" means that the file has none."""

    user: str = "user_id"
    item: str = "item_id"
    action: str = "action"
    timestamp: str = "timestamp_ms"
    surface: str = ""
    duration_ms: str = ""
    event_id: str = ""
    time_unit: Literal["ms", "s"] = "ms"
    value: str = ""


class _Event(msgspec.Struct, omit_defaults=True):
    """The value of a record in `user-actions`."""

    user_id: str
    item_id: str
    action: str
    timestamp_ms: int
    event_id: str
    surface: str | None = None
    duration_ms: int | None = None
    value: float | None = None


@dataclass(frozen=True, slots=True)
class EventLog:
    """N events in the order in which they are to be sent."""

    user_keys: list[bytes]
    """UTF-8 ids of the U distinct users."""
    user_index: I64
    """[N] into `user_keys`."""
    timestamp_ms: I64
    """[N] event time."""
    latest_ms: I64
    """[N] latest event time up to each row: the time at which the event is due at the log's own pace."""
    table: pa.Table
    """Columns user_id, item_id, action, timestamp_ms, event_id and, where given, surface, duration_ms and value."""

    def __len__(self) -> int:
        return len(self.user_index)

    def head(self, count: int) -> EventLog:
        """Return the first `count` events."""
        return EventLog(
            self.user_keys,
            self.user_index[:count],
            self.timestamp_ms[:count],
            self.latest_ms[:count],
            self.table.slice(0, count),
        )

    def records(self, rows: I64) -> Iterator[tuple[bytes, bytes]]:
        """Yield key and JSON value of each of the rows, which ascend."""
        encode = msgspec.json.Encoder().encode
        chosen = self.table.slice(rows[0], rows[-1] - rows[0] + 1).take(pa.array(rows - rows[0]))
        columns = [chosen[name].to_pylist() for name in chosen.column_names]
        names = chosen.column_names
        for user, values in zip(self.user_index[rows].tolist(), zip(*columns, strict=True), strict=True):
            yield self.user_keys[user], encode(_Event(**dict(zip(names, values, strict=True))))


def load_log(path: Path, columns: Columns | None = None) -> EventLog:
    """Read a Parquet or CSV file (by its suffix; `.csv.gz` too) and sort it by event time, ties in file order.

    Without a column of event ids each event gets an id made of the log's digest and its row, the same at every load.
    Raises `LogUnreadable`.
    """
    columns = columns or Columns()
    try:
        raw = pa.parquet.read_table(path) if path.suffix == ".parquet" else pa.csv.read_csv(path)
    except (OSError, pa.ArrowException) as error:
        raise LogUnreadable(f"cannot read the log {path}", str(error), "give a Parquet or CSV file") from error
    table = _named(raw, columns, path)
    return event_log(table.take(pc.array_sort_indices(table["timestamp_ms"])))


def event_log(table: pa.Table) -> EventLog:
    """Return the log of a table whose rows are in sending order and whose columns have the JSON names of an event."""
    if not len(table):
        raise LogUnreadable("the log is empty", "it has no rows", "give a log with events")
    if "event_id" not in table.column_names:
        table = table.append_column("event_id", _event_ids(table))
    users = table["user_id"].combine_chunks().dictionary_encode()
    timestamp_ms = table["timestamp_ms"].to_numpy()
    return EventLog(
        user_keys=[user.encode() for user in users.dictionary.to_pylist()],
        user_index=users.indices.to_numpy().astype(np.int64),
        timestamp_ms=timestamp_ms,
        latest_ms=np.maximum.accumulate(timestamp_ms),
        table=table.select([name for name in _Event.__struct_fields__ if name in table.column_names]),
    )


def _named(raw: pa.Table, columns: Columns, path: Path) -> pa.Table:
    """Return the replayed columns under their JSON names, with their types; no row may lack a required one."""
    sources = {
        "user_id": columns.user,
        "item_id": columns.item,
        "action": columns.action,
        "timestamp_ms": columns.timestamp,
        "surface": columns.surface,
        "duration_ms": columns.duration_ms,
        "event_id": columns.event_id,
        "value": columns.value,
    }
    named = {name: source for name, source in sources.items() if source}
    if missing := sorted(set(named.values()) - set(raw.column_names)):
        raise LogUnreadable(
            f"{path} lacks the columns {', '.join(missing)}",
            f"it has {', '.join(raw.column_names)}",
            "name them with --user, --item, --action and --timestamp",
        )
    table = pa.table({name: _typed(name, raw[source], columns, path) for name, source in named.items()})
    for name in ("user_id", "item_id", "action", "timestamp_ms"):
        if nulls := table[name].null_count:
            raise LogUnreadable(
                f"{path} has {nulls} rows without {named[name]}", "every event needs one", "remove these rows"
            )
    return table


def _typed(name: str, column: pa.ChunkedArray, columns: Columns, path: Path) -> pa.ChunkedArray:
    try:
        if name == "timestamp_ms":
            return _milliseconds(column, columns.time_unit)
        return pc.cast(column, {"duration_ms": "int64", "value": "float64"}.get(name, "string"))
    except pa.ArrowException as error:
        raise LogUnreadable(
            f"cannot read the column for {name} in {path}", str(error), "name another column, or convert it"
        ) from error


def _milliseconds(column: pa.ChunkedArray, unit: Literal["ms", "s"]) -> pa.ChunkedArray:
    if pa.types.is_timestamp(column.type):
        return pc.cast(pc.cast(column, pa.timestamp("ms"), safe=False), "int64")
    scaled = pc.multiply(column, 1_000) if unit == "s" else column
    return pc.cast(scaled, "int64", safe=False)


def _event_ids(table: pa.Table) -> pa.Array:
    digest = xxh3_64_hexdigest(table["timestamp_ms"].to_numpy().tobytes())[:8]
    return pa.array([f"{digest}-{row}" for row in range(len(table))])
