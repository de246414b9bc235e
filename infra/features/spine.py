"""The spine: for which users, as of which times, values are wanted. Read from Parquet and checked as a whole.

Shapes: Q rows, U different users.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from encoder.arrays import F64, I64, Bool
from infra.errors import InfraError, detail

USER, AS_OF = "user_id", "as_of_ms"
ROWS_MAX = 100_000_000
BATCH_ROWS = 1 << 20
TIME_MAX_MS = 253_402_300_799_999
"""The end of the year 9999."""
MILLISECONDS_FROM = 315_532_800_000
"""1980 in ms, which is later than every present time in seconds."""


class SpineError(InfraError):
    """The spine cannot be used; the text names every problem with the first row that has it."""


@dataclass(frozen=True, slots=True)
class Spine:
    """Rows for which values are wanted, in the order of the file."""

    users: list[str]
    """[U] ids of the different users."""
    user_of_row: I64
    """[Q]"""
    as_of_ms: I64
    """[Q]"""

    def __len__(self) -> int:
        return len(self.as_of_ms)

    def table(self, low: int, high: int) -> dict[str, pa.Array]:
        """Return the two columns of some rows."""
        codes = pa.array(self.user_of_row[low:high])
        return {USER: pa.array(self.users, pa.string()).take(codes), AS_OF: pa.array(self.as_of_ms[low:high])}


def read_spine(path: Path) -> Spine:
    """Read the columns `user_id` and `as_of_ms` of a Parquet file; others are ignored. Raises `SpineError`."""
    problems = _Problems(path)
    numbers: dict[str, int] = {}
    users, times = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            problems.check_size(file.metadata.num_rows)
            problems.check_schema(file.schema_arrow)
            for batch in file.iter_batches(BATCH_ROWS, columns=[USER, AS_OF]):
                users.append(_users(batch.column(USER), numbers, problems))
                times.append(_times(batch.column(AS_OF), problems))
                problems.row += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise SpineError(
            "spine cannot be read", f"{path} ({detail(error)})", f"give a Parquet file with {USER} and {AS_OF}"
        ) from error
    as_of_ms = np.concatenate(times)
    if len(as_of_ms) and MILLISECONDS_FROM // 1_000 <= as_of_ms.max() < MILLISECONDS_FROM:
        problems.add(f"{AS_OF} looks like seconds", f"the last is {as_of_ms.max()}; give milliseconds")
    problems.raise_any()
    return Spine(list(numbers), np.concatenate(users), as_of_ms)


class _Problems:
    """What is wrong with a spine: one line per kind of problem."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[str, str] = {}
        self.row = 1
        """Number of the first row of the batch, from 1."""

    def add(self, kind: str, where: str) -> None:
        """Note a problem, unless it is known."""
        self._lines.setdefault(kind, where)

    def add_rows(self, kind: str, rows: Bool, column: pa.Array | None = None) -> None:
        """Note a problem of the rows of the batch in which `rows` is True, if there are any."""
        if rows.any():
            first = int(rows.argmax())
            shown = "" if column is None else f": {column[first].as_py()!r}"
            self.add(kind, f"first in row {self.row + first}{shown}")

    def raise_any(self) -> None:
        """Raise `SpineError` if anything is wrong."""
        if self._lines:
            text = "; ".join(f"{kind} ({where})" for kind, where in self._lines.items())
            raise SpineError(
                "spine is not valid", f"{self._path}: {text}", f"rows are counted from 1; {AS_OF} is in ms"
            )

    def check_size(self, rows: int) -> None:
        """Check the number of rows."""
        if rows > ROWS_MAX:
            self.add(f"there are more than {ROWS_MAX:,} rows", f"{rows:,}; divide the file")
        self.raise_any()

    def check_schema(self, schema: pa.Schema) -> None:
        """Check that both columns are there, and of a type that can be right."""
        wanted = {USER: (_is_user, "text"), AS_OF: (_is_time, "int64")}
        for name, (is_right, type_name) in wanted.items():
            if schema.names.count(name) != 1:
                self.add(f"there must be one column {name}", f"columns are {', '.join(schema.names[:20])}")
            elif not is_right(schema.field(name).type):
                self.add(f"{name} must be {type_name}", f"it is {schema.field(name).type}")
        self.raise_any()


def _is_user(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_user(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind))


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _users(column: pa.Array, numbers: dict[str, int], problems: _Problems) -> I64:
    """Return the number of each row's user [N], new users numbered on."""
    encoded = pc.dictionary_encode(pc.cast(column, pa.string()))
    problems.add_rows(f"{USER} is missing", ~_valid(encoded))
    found = encoded.dictionary.to_pylist()
    problems.add_rows(f"{USER} is empty", np.array(pc.fill_null(pc.equal(encoded.cast(pa.string()), ""), False)))
    of_code = np.array([numbers.setdefault(user, len(numbers)) for user in found], np.int64)
    codes = pc.fill_null(encoded.indices, 0).to_numpy(zero_copy_only=False)
    return of_code[codes] if len(of_code) else np.zeros(len(codes), np.int64)


def _times(column: pa.Array, problems: _Problems) -> I64:
    """Return the times [N]."""
    problems.add_rows(f"{AS_OF} is missing", ~_valid(column))
    if pa.types.is_floating(column.type):
        numbers: F64 = pc.fill_null(pc.cast(column, pa.float64()), 0.0).to_numpy(zero_copy_only=False)
        problems.add_rows(
            f"{AS_OF} is not a whole number", ~(np.isfinite(numbers) & (numbers == np.rint(numbers))), column
        )
        times = np.nan_to_num(np.clip(numbers, -1, TIME_MAX_MS + 1)).astype(np.int64)
    else:
        unsigned = pa.types.is_uint64(column.type)
        capped = pc.min_element_wise(column, pa.scalar(TIME_MAX_MS + 1, column.type)) if unsigned else column
        times = pc.fill_null(capped, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    problems.add_rows(f"{AS_OF} is before 1970 or after the year 9999", (times < 0) | (times > TIME_MAX_MS), column)
    return times


def _valid(column: pa.Array) -> Bool:
    valid: Bool = column.is_valid().to_numpy(zero_copy_only=False)
    return valid


def rows_by_user(spine: Spine) -> tuple[I64, I64]:
    """Return the rows in order of user and time [Q], and where each user's begin [U + 1]."""
    order = np.lexsort((spine.as_of_ms, spine.user_of_row))
    return order, np.searchsorted(spine.user_of_row[order], np.arange(len(spine.users) + 1))
