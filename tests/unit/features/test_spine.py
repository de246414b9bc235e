"""The spine: any order and any type that can be right; everything else is named with its first row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from infra.features import spine
from infra.features.spine import Spine, SpineError, read_spine, rows_by_user

NOW_MS = 1_764_547_200_000


def written(path: Path, **columns: Any) -> Path:
    """Write a spine; a column is a list or an Arrow array."""
    pa.parquet.write_table(pa.table(columns), path / "spine.parquet")
    return path / "spine.parquet"


def refused(path: Path) -> str:
    """Return why a spine is refused."""
    with pytest.raises(SpineError) as caught:
        read_spine(path)
    return str(caught.value)


@pytest.mark.parametrize(
    "users",
    [
        ["b", "a", "b", "ü"],
        pa.array(["b", "a", "b", "ü"], pa.large_string()),
        pa.array(["b", "a", "b", "ü"]).dictionary_encode(),
    ],
)
@pytest.mark.parametrize("kind", [pa.int64(), pa.float64(), pa.uint64()])
def test_rows_are_read_as_they_are(
    tmp_path: Path, users: Any, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order, duplicates and other columns do not matter; numbers may be whole floating-point ones."""
    monkeypatch.setattr(spine, "BATCH_ROWS", 3)
    times = pa.array([NOW_MS, 0, NOW_MS, 5], pa.int64()).cast(kind)
    found = read_spine(written(tmp_path, label=[1, 2, 3, 4], as_of_ms=times, user_id=users))
    assert [found.users[at] for at in found.user_of_row] == ["b", "a", "b", "ü"]
    assert found.as_of_ms.tolist() == [NOW_MS, 0, NOW_MS, 5]


def test_ids_may_be_numbers_as_in_logs(tmp_path: Path) -> None:
    """A column of whole numbers names the users that a log with such a column has."""
    assert read_spine(written(tmp_path, user_id=[7, 8], as_of_ms=[1, 2])).users == ["7", "8"]


def test_an_empty_spine_is_read(tmp_path: Path) -> None:
    """No rows are no rows."""
    users, times = pa.array([], pa.string()), pa.array([], pa.int64())
    assert len(read_spine(written(tmp_path, user_id=users, as_of_ms=times))) == 0


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"user_id": ["a", None], "as_of_ms": [NOW_MS, 2]}, "user_id is missing (first in row 2)"),
        ({"user_id": ["a", ""], "as_of_ms": [NOW_MS, 2]}, "user_id is empty (first in row 2)"),
        ({"user_id": ["a", "b"], "as_of_ms": [NOW_MS, None]}, "as_of_ms is missing (first in row 2)"),
        ({"user_id": ["a", "b"], "as_of_ms": [float("nan"), 2.0]}, "not a whole number (first in row 1: nan)"),
        ({"user_id": ["a", "b"], "as_of_ms": [float("inf"), 2.0]}, "not a whole number (first in row 1: inf)"),
        ({"user_id": ["a", "b"], "as_of_ms": [1.0, 2.5]}, "not a whole number (first in row 2: 2.5)"),
        ({"user_id": ["a", "b"], "as_of_ms": [1e300, 2.0]}, "after the year 9999 (first in row 1: 1e+300)"),
        ({"user_id": ["a", "b"], "as_of_ms": [NOW_MS, -1]}, "before 1970 or after the year 9999 (first in row 2: -1)"),
        ({"user_id": ["a", "b"], "as_of_ms": [1, 2**62]}, "after the year 9999 (first in row 2: 4611686018427387904)"),
        (
            {"user_id": ["a", "b"], "as_of_ms": pa.array([1, 2**64 - 1], pa.uint64())},
            "after the year 9999 (first in row 2: 18446744073709551615)",
        ),
        (
            {"user_id": ["a", "b"], "as_of_ms": [1_764_547_200, 1]},
            "as_of_ms looks like seconds (the last is 1764547200; give",
        ),
        ({"user_id": ["a", "b"], "as_of_ms": ["1", "2"]}, "as_of_ms must be int64 (it is string)"),
        ({"user_id": ["a", "b"], "as_of_ms": pa.array([1, 2], pa.timestamp("ms"))}, "it is timestamp[ms]"),
        ({"user_id": [1.5, 2.5], "as_of_ms": [1, 2]}, "user_id must be text (it is double)"),
        ({"user": ["a", "b"], "as_of_ms": [1, 2]}, "there must be one column user_id (columns are user, as_of_ms)"),
    ],
)
def test_each_problem_is_named(tmp_path: Path, columns: dict[str, Any], problem: str) -> None:
    """A value that cannot be right is refused with the row that has it."""
    assert problem in refused(written(tmp_path, **columns))


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    """Four problems in rows of different batches are in one line."""
    text = refused(written(tmp_path, user_id=["a", None, "", "d"], as_of_ms=[None, -1.0, 0.5, 4.0]))
    assert all(each in text for each in ("is missing", "is empty", "not a whole number", "before 1970"))
    assert "\n" not in text


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    """A missing file, a folder and a file of another format end in one line."""
    (tmp_path / "text.parquet").write_text("user_id,as_of_ms")
    for name in ("absent.parquet", "text.parquet", "."):
        assert "spine cannot be read" in refused(tmp_path / name)


def test_the_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spine that would not fit into memory is refused before it is read."""
    monkeypatch.setattr(spine, "ROWS_MAX", 3)
    assert "more than 3 rows (4; divide the file)" in refused(written(tmp_path, user_id=["a"] * 4, as_of_ms=[1] * 4))


def test_rows_by_user_are_in_order_of_time() -> None:
    """The rows of each user are one after another, oldest first."""
    order, starts = rows_by_user(Spine(["a", "b", "c"], np.array([1, 0, 1, 2]), np.array([9, 4, 3, 1])))
    assert order.tolist() == [1, 2, 0, 3]
    assert starts.tolist() == [0, 1, 3, 4]
