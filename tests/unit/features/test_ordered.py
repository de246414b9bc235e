"""Rows in any order come back in their own, with one run in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from infra.features.ordered import OrderedRows

SEED = 20_261_202


@pytest.mark.parametrize(("count", "run_rows"), [(0, 10), (1, 10), (100, 1_000), (1_000, 100), (1_000, 7), (512, 512)])
@pytest.mark.parametrize("window", [1_000, 64])
def test_rows_come_back_in_order(tmp_path: Path, count: int, run_rows: int, window: int) -> None:
    """Every row is returned once, in order of the places, whether runs are in memory or on disk."""
    rng = np.random.default_rng(SEED)
    rows = OrderedRows(tmp_path, run_rows)
    places = rng.permutation(count)
    for low in range(0, count, 30):
        part = places[low : low + 30]
        rows.add(part, pa.table({"number": part * 3, "list": [[str(each)] * (each % 3) for each in part.tolist()]}))
    windows = list(rows.windows(window))
    assert [high - low for low, high, _ in windows] == [len(table) for _, _, table in windows]
    found = [row for _, _, table in windows for row in table.to_pylist()]
    assert found == [{"number": place * 3, "list": [str(place)] * (place % 3)} for place in range(count)]
    assert len(list(tmp_path.iterdir())) <= count // run_rows
    assert bool(list(tmp_path.iterdir())) is (count > run_rows or count == run_rows == 512)


def test_batches_without_rows_are_nothing(tmp_path: Path) -> None:
    """A batch of a timeline may hold no query."""
    rows = OrderedRows(tmp_path)
    rows.add(np.zeros(0, np.int64), pa.table({"number": pa.array([], pa.int64())}))
    rows.add(np.array([0]), pa.table({"number": [5]}))
    assert [table.to_pylist() for _, _, table in rows.windows()] == [[{"number": 5}]]
