"""Event logs of every format become the same events in event-time order; an unreadable one is one clear line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from infra.datasets.event_log import Columns, EventLog, LogUnreadable, event_log, load_log

ROWS: dict[str, list[Any]] = {
    "user_id": ["b", "a", "a", "ü"],
    "item_id": ["i2", "i1", "i3", "i4"],
    "action": ["view", "view", "save", "view"],
    "timestamp_ms": [2_000, 1_000, 2_000, 500],
}


def test_sorted_by_event_time_ties_in_file_order(tmp_path: Path) -> None:
    """Rows are sent in order of event time; rows with the same time keep the order of the file."""
    values = _values(load_log(_parquet(tmp_path, ROWS)))
    assert [value["item_id"] for value in values] == ["i4", "i1", "i2", "i3"]


def test_csv_and_parquet_give_the_same_records(tmp_path: Path) -> None:
    """CSV, gzipped CSV and Parquet with the same rows give the same keys and the same bytes."""
    lines = [",".join(ROWS), *(",".join(map(str, row)) for row in zip(*ROWS.values(), strict=True))]
    text = "\n".join(lines).encode()
    (tmp_path / "log.csv").write_bytes(text)
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(text))
    logs = [load_log(tmp_path / "log.csv"), load_log(tmp_path / "log.csv.gz"), load_log(_parquet(tmp_path, ROWS))]
    records = [list(log.records(np.arange(4))) for log in logs]
    assert records[0] == records[1] == records[2]
    assert records[0][0][0] == "ü".encode()


def test_values_are_the_contract(tmp_path: Path) -> None:
    """A value has the fields of the contract without absent optional ones, and an event id of its own."""
    values = _values(load_log(_parquet(tmp_path, ROWS)))
    assert {tuple(value) for value in values} == {("user_id", "item_id", "action", "timestamp_ms", "event_id")}
    assert len({value["event_id"] for value in values}) == 4
    assert values[1] == {
        "user_id": "a",
        "item_id": "i1",
        "action": "view",
        "timestamp_ms": 1_000,
        "event_id": values[1]["event_id"],
    }


def test_event_ids_are_the_same_at_every_load(tmp_path: Path) -> None:
    """A second replay of a log repeats its event ids, so that the stream recognises its events as duplicates."""
    path = _parquet(tmp_path, ROWS)
    assert _values(load_log(path)) == _values(load_log(path))


def test_named_columns_seconds_and_optional_fields(tmp_path: Path) -> None:
    """Columns of other names, whole or fractional seconds, numeric ids and optional columns are read."""
    columns = Columns("who", "what", "did", "at", "where", "took", "id", "s", "price")
    row = {"who": 1, "what": 2.0, "did": "view", "at": 1.5, "where": "home", "took": 30, "id": "e", "price": 2}
    rows = {name: [value] for name, value in row.items()}
    assert _values(load_log(_parquet(tmp_path, rows), columns)) == [
        {
            "user_id": "1",
            "item_id": "2",
            "action": "view",
            "timestamp_ms": 1_500,
            "event_id": "e",
            "surface": "home",
            "duration_ms": 30,
            "value": 2.0,
        }
    ]


def test_rows_of_one_partition_may_be_any_subset(tmp_path: Path) -> None:
    """`records` of some rows are the same as those rows of all records."""
    log = load_log(_parquet(tmp_path, ROWS))
    everything = list(log.records(np.arange(4)))
    assert list(log.records(np.array([1, 3]))) == [everything[1], everything[3]]
    assert list(log.head(2).records(np.arange(2))) == everything[:2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"user_id": ["a"], "item_id": ["b"]}, "lacks the columns action, timestamp_ms"),
        ({**ROWS, "item_id": ["i", None, "j", "k"]}, "1 rows without item_id"),
        ({**ROWS, "timestamp_ms": ["noon", "1", "2", "3"]}, "cannot read the column for timestamp_ms"),
        ({name: [] for name in ROWS}, "the log is empty"),
    ],
)
def test_unusable_logs_are_one_clear_line(tmp_path: Path, rows: dict[str, list[Any]], message: str) -> None:
    """A missing column, a missing value, an invalid time and an empty log are each named in one line."""
    with pytest.raises(LogUnreadable, match=message) as caught:
        load_log(_parquet(tmp_path, rows))
    assert "\n" not in str(caught.value)


def test_half_a_file_is_one_clear_line(tmp_path: Path) -> None:
    """A truncated Parquet file and a missing file are reported in one line, without an Arrow error."""
    path = _parquet(tmp_path, ROWS)
    path.write_bytes(path.read_bytes()[:100])
    for broken in (path, tmp_path / "none.csv"):
        with pytest.raises(LogUnreadable, match="cannot read the log") as caught:
            load_log(broken)
        assert "\n" not in str(caught.value)


def test_a_table_keeps_its_order() -> None:
    """A table keeps its order, so late events stay late; the time that paces it never goes back."""
    log = event_log(pa.table(ROWS))
    assert log.timestamp_ms.tolist() == [2_000, 1_000, 2_000, 500]
    assert log.latest_ms.tolist() == [2_000, 2_000, 2_000, 2_000]


def _parquet(folder: Path, rows: dict[str, list[Any]]) -> Path:
    path = folder / "log.parquet"
    pa.parquet.write_table(pa.table(rows), path)
    return path


def _values(log: EventLog) -> list[dict[str, object]]:
    return [json.loads(value) for _, value in log.records(np.arange(len(log)))]
