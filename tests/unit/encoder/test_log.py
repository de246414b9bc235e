"""Optional columns of a log: numbers of actions, and event ids by which repeated actions are dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from encoder.data.log import ActionLog, LogColumns, LogError, read_log
from encoder.data.shards import Shards, open_log
from tests.unit.encoder.walks import MINUTE_MS, START_MS

WITH_VALUE = LogColumns(value="value")
WITH_IDS = LogColumns(value="value", event_id="event_id")
VALUES = [3.0, None, -1.5, 0.0, 2e9, None]


def table(**columns: Any) -> pa.Table:
    """Return six actions of two users, newest first, with more columns."""
    rows = range(6)
    return pa.table(
        {
            "user_id": [f"u{row % 2}" for row in rows],
            "item_id": [f"i{row}" for row in rows],
            "action": ["view"] * 6,
            "timestamp_ms": [START_MS - row * MINUTE_MS for row in rows],
            **columns,
        }
    )


def written(made: pa.Table, path: Path) -> Path:
    """Write a table to a file of the format that its suffix names."""
    if path.suffix == ".parquet":
        pa.parquet.write_table(made, path)
    elif path.suffix == ".csv":
        pa.csv.write_csv(made, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in made.to_pylist()))
    return path


def in_order(log: ActionLog) -> list[float]:
    """Return the values of u0, oldest first, then of u1."""
    assert log.values is not None
    return log.values.tolist()


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_values_are_read_and_follow_their_actions(tmp_path: Path, suffix: str) -> None:
    """A number stays with its action when rows are sorted and selected; an absent one is NaN."""
    log = read_log(written(table(value=VALUES), tmp_path / f"log.{suffix}"), WITH_VALUE)
    np.testing.assert_array_equal(in_order(log), [2e9, -1.5, 3.0, np.nan, 0.0, np.nan])
    np.testing.assert_array_equal(in_order(log.before(START_MS - 2 * MINUTE_MS)), [2e9, np.nan, 0.0])


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_a_log_without_values_is_as_before(tmp_path: Path, suffix: str) -> None:
    """A column that is not named is not read, even if there is one that could not be."""
    path = written(table(value=["a"] * 6), tmp_path / f"log.{suffix}")
    assert read_log(path, LogColumns()).values is None


@pytest.mark.parametrize("values", [[None] * 6, [1, None, 3, 4, 5, 6], [1.5, None, 3, 4, 5, 6]])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_any_type_of_number_will_do(tmp_path: Path, suffix: str, values: list[Any]) -> None:
    """Columns of integers, and columns that are empty, are columns of numbers."""
    log = read_log(written(table(value=values), tmp_path / f"log.{suffix}"), WITH_VALUE)
    wanted = [np.nan if values[row] is None else values[row] for row in (4, 2, 0, 5, 3, 1)]
    np.testing.assert_array_equal(in_order(log), wanted)


@pytest.mark.parametrize(
    ("suffix", "values", "message"),
    [
        ("csv", ["1.5", "", "abc", "2", "x", "3"], "column value .* 2 rows, the first of which is 3 .*: 'abc'"),
        ("csv", ["1", "2", "nan", "4", "5", "6"], "column value .* row 3 .*: nan"),
        ("csv", ["1", "2", "3", "4", "5", "-inf"], "column value .* row 6 .*: -inf"),
        ("csv", ["1", "2", "3", "4", "1e999", "6"], "column value .* row 5 .*: inf"),
        ("csv", ["true"] * 6, "column value .* 6 rows, the first of which is 1 .*: True"),
        ("parquet", [1.0, None, float("nan"), 4.0, 5.0, 6.0], "column value .* row 3 .*: nan"),
        ("parquet", [1.0, None, 3.0, float("inf"), 5.0, 6.0], "column value .* row 4 .*: inf"),
        ("parquet", [None, "2.5", None, None, None, None], r"column value .* row 2 .*: '2\.5'"),
        ("parquet", [None, None, None, None, None, True], "column value .* row 6 .*: True"),
        ("jsonl", [1.0, 2.0, "abc", 4.0, 5.0, 6.0], "cannot be read.*/value.* row 2"),
        ("jsonl", [1.0, None, 3.0, 4.0, float("nan"), 6.0], "value .* row 5 .*nan"),
    ],
)
def test_what_is_not_a_number_is_named(tmp_path: Path, suffix: str, values: list[Any], message: str) -> None:
    """NaN, infinities, text and truth values end the reading with the row and the column; none becomes a number."""
    path = tmp_path / f"log.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in with_values(values)))
    else:
        written(table(value=values), path)
    with pytest.raises(LogError, match=message):
        read_log(path, WITH_VALUE)


def with_values(values: list[Any]) -> list[dict[str, Any]]:
    """Return the six actions as objects, with values that one column could not hold."""
    return [{**row, "value": value} for row, value in zip(table().to_pylist(), values, strict=True)]


def in_shards(made: pa.Table, folder: Path) -> Shards:
    """Return a log, written as two files, in shards."""
    (folder / "log").mkdir()
    half = len(made) // 2
    pa.parquet.write_table(made.slice(0, half), folder / "log" / "a.parquet")
    pa.parquet.write_table(made.slice(half), folder / "log" / "b.parquet")
    opened = open_log(folder / "log", WITH_IDS, rows_max=len(made) - 1, folder=folder / "shards")
    assert isinstance(opened, Shards)
    return opened


def many(values: list[Any], ids: list[Any]) -> pa.Table:
    """Return actions of fifty users, one after another in time."""
    return pa.table(
        {
            "user_id": [f"u{row % 50}" for row in range(len(values))],
            "item_id": [f"i{row}" for row in range(len(values))],
            "action": ["view"] * len(values),
            "timestamp_ms": [START_MS + row for row in range(len(values))],
            "value": values,
            "event_id": ids,
        }
    )


def test_shards_keep_values_and_ids(tmp_path: Path) -> None:
    """Values and dropped repeats of a log in shards are those of the log in memory."""
    rng = np.random.default_rng(3)
    values = [None if rng.random() < 0.3 else int(rng.integers(100)) for _ in range(1_000)]
    made = many(values, [None if row % 3 else f"id{row % 90}" for row in range(1_000)])
    shards = in_shards(made, tmp_path)
    parts = [shards.read(number) for number in range(len(shards))]
    whole = read_log(tmp_path / "log", WITH_IDS)
    assert sum(part.repeats for part in parts) == whole.repeats > 0
    by_user = {}
    for log in (*parts, whole):
        for user, low, high in zip(log.users, log.starts[:-1], log.starts[1:], strict=True):
            by_user.setdefault(user, []).append((log.actions[low:high].tolist(), str(log.values[low:high].tolist())))
    assert len(by_user) == 50
    assert all(first == second for first, second in by_user.values())


def test_a_wrong_value_of_a_sharded_log_is_named_by_its_row_in_the_log(tmp_path: Path) -> None:
    """Rows count over all files of a log, also if it is distributed over shards."""
    made = many([1.0] * 700 + [float("nan")] + [1.0] * 299, [None] * 1_000)
    with pytest.raises(LogError, match=r"column value .* row 701 "):
        in_shards(made, tmp_path)


def test_repeated_event_ids_of_a_user_are_dropped(tmp_path: Path) -> None:
    """The first row in the file stays, whatever its time; another user's id and an absent id repeat nothing."""
    ids = ["a", "a", "b", None, "a", ""]
    log = read_log(written(table(value=list(range(6)), event_id=ids), tmp_path / "log.parquet"), WITH_IDS)
    assert in_order(log) == [2, 0, 5, 3, 1]  # u0 loses row 4, which is older and repeats the id of row 0
    assert log.repeats == 1
    assert log.starts.tolist() == [0, 2, 5]


@pytest.mark.parametrize("time", [float("nan"), float("inf")])
def test_a_time_that_is_no_number_ends_the_reading(tmp_path: Path, time: float) -> None:
    """NaN and infinity are not event times; they were read as the year -292,277,022."""
    made = table().set_column(3, "timestamp_ms", pa.array([1.0, 2.0, time, 4.0, 5.0, 6.0]))
    with pytest.raises(LogError, match="timestamp_ms has values that are not times"):
        read_log(written(made, tmp_path / "log.parquet"), LogColumns())


def test_a_duration_that_is_no_number_ends_the_reading(tmp_path: Path) -> None:
    """NaN is not a duration, and an absent one is 0."""
    durations = LogColumns(duration_ms="ms")
    log = read_log(written(table(ms=[1, None, 3, 4, 5, 6]), tmp_path / "log.parquet"), durations)
    assert log.actions["duration_ms"].tolist() == [5, 3, 1, 6, 4, 0]
    with pytest.raises(LogError, match=r"column ms .* row 2 .*: nan"):
        read_log(written(table(ms=[1, float("nan"), 3, 4, 5, 6]), tmp_path / "log.parquet"), durations)
