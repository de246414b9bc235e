"""Rows that are found in any order, written in their own: sorted runs on disk, merged at the end.

Each row has its *place* in the result. Rows are kept in memory until a run is full; a run is sorted and written as an
Arrow file. The places of all runs together are 0 to N - 1, so a window of the result is a slice of every run:

    window 4 to 7      run 0:  0 3 [4 7] 8      run 1:  1 2 [5 6] 9      result:  4 5 6 7
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from encoder.arrays import I64

PLACE = "place"
RUN_ROWS, WINDOW_ROWS = 500_000, 65_536


class OrderedRows:
    """Takes rows in any order; yields the rows in order of their places. At most one run is in memory."""

    def __init__(self, folder: Path, run_rows: int = RUN_ROWS) -> None:
        """Write runs to `folder` if there are more rows than `run_rows`."""
        self._folder, self._run_rows = folder, run_rows
        self._held: list[pa.Table] = []
        self._runs: list[Path] = []
        self._rows = self._held_rows = 0

    def add(self, places: I64, rows: pa.Table) -> None:
        """Add rows with their places."""
        self._held.append(rows.append_column(PLACE, pa.array(places)))
        self._held_rows += len(rows)
        self._rows += len(rows)
        if self._held_rows >= self._run_rows:
            self._flush()

    def windows(self, rows: int = WINDOW_ROWS) -> Iterator[tuple[int, int, pa.Table]]:
        """Yield consecutive windows of the result: bounds, and the table without places."""
        tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in self._runs]
        if self._held:
            tables.append(self._sorted())
            self._held = []
        places = [table[PLACE].to_numpy() for table in tables]
        for low in range(0, self._rows, rows):
            high = min(low + rows, self._rows)
            parts = [_between(table, of_run, low, high) for table, of_run in zip(tables, places, strict=True)]
            window = pa.concat_tables([part for part in parts if len(part)])
            order = np.argsort(window[PLACE].to_numpy())
            yield low, high, window.drop_columns([PLACE]).take(order)

    def _sorted(self) -> pa.Table:
        table = pa.concat_tables(self._held)
        return table.take(np.argsort(table[PLACE].to_numpy()))

    def _flush(self) -> None:
        path = self._folder / f"run-{len(self._runs)}.arrow"
        table = self._sorted()
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table, WINDOW_ROWS)
        self._runs.append(path)
        self._held, self._held_rows = [], 0


def _between(table: pa.Table, places: Any, low: int, high: int) -> pa.Table:
    first, last = np.searchsorted(places, [low, high]).tolist()
    return table.slice(first, last - first)
