"""Sharded logs: a log larger than memory, streamed from Parquet into shards that each fit into memory.

Users are distributed over files by a hash of their id, rows keep the order of the log, and a shard is a group of files.
A shard is therefore read like any other log, contains whole users only, and is a random sample of the users.

Shapes: N rows of one chunk, F files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from encoder.actions.columns import item_key
from encoder.arrays import I64
from encoder.data.log import (
    ActionLog,
    LogColumns,
    LogError,
    distinct,
    log_from_table,
    numbers,
    parquet_files,
    read_log,
    readable,
    times_ms,
)
from encoder.distributed import is_main_process

FOLDER = "log-shards"
MANIFEST = "shards.json"
FILES_PER_SHARD, FILES_MAX = 4, 512
"""Several small files fill a shard well even if the hash gives them different sizes; all files are open at once."""
BATCH_ROWS, CHUNK_ROWS = 1 << 16, 1 << 21
"""Number of rows decoded at once, and number of rows distributed over the files at once."""
PROGRESS_EVERY_S = 2.0
ProgressText = Callable[[str], None]
"""Callback that shows a line of progress to people."""


@dataclass(frozen=True, slots=True)
class Shards:
    """A log in shards, which are read one at a time."""

    folder: Path
    columns: LogColumns
    progress: ProgressText
    """Callback that is informed of each shard read."""
    of: str
    """Hash of the log's files (paths, sizes, modification times) and of the options that they were sharded with."""
    digest: str
    """Hash of the content of the shards."""
    rows: int
    """Number of actions in all shards."""
    end_ms: int
    """Event time of the newest action plus 1."""
    action_names: Sequence[str]
    """Names of the action types in the whole log, most frequent first."""
    surface_names: Sequence[str]
    """Names of the surfaces in the whole log, most frequent first."""
    shards: Sequence[Sequence[int]]
    """Numbers of the files of each shard."""

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, number: int) -> ActionLog:
        """Return shard `number`, from 0. Raises `LogError`."""
        self.progress(f"reading shard {number + 1} of {len(self)}")
        with readable(self.folder):
            files = [_file(self.folder, file) for file in self.shards[number]]
            return log_from_table(pyarrow.parquet.read_table(files, partitioning=None), self.columns)

    def remove(self) -> None:
        """Remove the shards from disk."""
        shutil.rmtree(self.folder, ignore_errors=True)


def open_log(
    path: Path, columns: LogColumns, *, rows_max: int, folder: Path, progress: ProgressText = lambda _: None
) -> ActionLog | Shards:
    """Open the log at `path`: in memory if it has at most `rows_max` actions or is not Parquet, else as shards.

    Shards are written to `folder` and have at most `rows_max / 2` actions each. Complete shards of the same files, left
    by a process that was killed, are used again. In a process group the main process writes and the others wait.
    `progress` is called every two seconds while writing, and with each shard that is read later. Raises `LogError`.
    """
    with readable(path):
        files = parquet_files(path)
        rows = sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
        if rows <= rows_max:
            return read_log(path, columns)
        of = _hash_of(files, columns, rows_max)
        if is_main_process() and _manifest(folder, of) is None:
            _Writer(files, columns, folder, rows, rows_max // 2, progress).write(of)
    while (manifest := _manifest(folder, of)) is None:
        time.sleep(0.2)
    return Shards(folder=folder, columns=columns, progress=progress, **manifest)


class _Writer:
    """Streams the files of a log into shards of at most `shard_rows` rows each."""

    def __init__(
        self,
        files: Sequence[Path],
        columns: LogColumns,
        folder: Path,
        rows: int,
        shard_rows: int,
        progress: ProgressText,
    ) -> None:
        self._files, self._columns, self._folder, self._progress = files, columns, folder, progress
        self._rows, self._shard_rows = rows, shard_rows
        self._file_count = min(FILES_MAX, -(-rows * FILES_PER_SHARD // shard_rows))
        self._actions: Counter[str] = Counter()
        self._surfaces: Counter[str] = Counter()
        self._end_ms = 0

    def write(self, of: str) -> None:
        """Write all shards, then the manifest, whose presence marks the shards as complete.

        Raises `LogError` if the disk is too small, or if a shard is too small for one of its files.
        """
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        needed, free = sum(file.stat().st_size for file in self._files), shutil.disk_usage(self._folder).free
        if needed > free:
            raise LogError(f"shards need {needed:,} bytes and {free:,} are free: make room or move {self._folder}")
        file_rows = np.zeros(self._file_count, np.int64)  # [F]
        paths = [_file(self._folder, number) for number in range(self._file_count)]
        done, reported = 0, time.monotonic()
        with ExitStack() as stack:
            writers: list[Any] = []
            for chunk in _chunks(self._files, self._columns, min(CHUNK_ROWS, self._shard_rows)):
                if not writers:
                    writers = [stack.enter_context(pyarrow.parquet.ParquetWriter(path, chunk.schema)) for path in paths]
                file_rows += self._distribute(chunk, writers)
                done += len(chunk)
                if time.monotonic() - reported >= PROGRESS_EVERY_S:
                    reported = time.monotonic()
                    self._progress(f"{done:,} of {self._rows:,} actions written to shards")
        shards = list(_packed(file_rows.tolist(), self._shard_rows))
        values = {
            "of": of,
            "digest": _digest(paths, shards),
            "rows": done,
            "end_ms": self._end_ms,
            "action_names": [name for name, _ in self._actions.most_common() if name],
            "surface_names": [name for name, _ in self._surfaces.most_common() if name],
            "shards": shards,
        }
        beside = self._folder / (MANIFEST + ".part")
        beside.write_text(json.dumps(values))
        beside.replace(self._folder / MANIFEST)

    def _distribute(self, chunk: pa.Table, writers: Sequence[Any]) -> I64:
        """Write each row to its user's file, in the given order; return the number of rows [F] written to each."""
        users, user_of_row = distinct(chunk, self._columns.user)
        file = np.array([item_key(user) % self._file_count for user in users], np.int64)[user_of_row]  # [N]
        order = np.argsort(file, kind="stable")  # [N] rows by file, in their order within each
        bounds = np.searchsorted(file[order], np.arange(self._file_count + 1))  # [F + 1]: file f owns bounds[f:f + 2]
        sorted_rows = chunk.take(order)
        for writer, first, last in zip(writers, bounds[:-1], bounds[1:], strict=True):
            if last > first:
                writer.write_table(sorted_rows.slice(first, last - first))
        self._end_ms = max(self._end_ms, int(times_ms(chunk, self._columns).max()) + 1)
        for name, counter in ((self._columns.action, self._actions), (self._columns.surface, self._surfaces)):
            if name:
                values, at = distinct(chunk, name)
                counter.update(dict(zip(values, np.bincount(at).tolist(), strict=True)))
        return np.diff(bounds)


def _chunks(files: Sequence[Path], columns: LogColumns, rows_max: int) -> Iterator[pa.Table]:
    """Yield the rows of Parquet files in order, at most `rows_max` at once, with ids and names as text."""
    held: list[pa.Table] = []
    schema, row = None, 1
    for file in files:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(min(BATCH_ROWS, rows_max), columns=columns.named):
            table = _typed(pa.Table.from_batches([batch]).select(columns.named), columns, row)
            row += len(table)
            schema = schema or table.schema
            if sum(map(len, held)) + len(table) > rows_max:
                yield pa.concat_tables(held)
                held = []
            held.append(table.cast(schema))
    yield pa.concat_tables(held)


def _typed(table: pa.Table, columns: LogColumns, first_row: int) -> pa.Table:
    """Cast the columns of ids and names to text, and those of numbers to float; `first_row` is for errors only."""
    texts = {columns.user, columns.item, columns.action, columns.surface, columns.event_id}
    typed = {name: pc.cast(table[name], pa.string()) if name in texts else table[name] for name in table.column_names}
    if columns.value:
        typed[columns.value] = pa.array(numbers(table, columns.value, first_row), from_pandas=True)
    return pa.table(typed)


def _packed(rows: Sequence[int], rows_max: int) -> Iterator[list[int]]:
    """Yield groups of consecutive files that fit into a shard. Raises `LogError` if a single file does not fit."""
    if max(rows) > rows_max:
        raise LogError(
            f"some users have too many actions for a shard: {max(rows):,}, and {rows_max:,} fit; "
            f"set log.rows_in_memory_max to {2 * max(rows):,} or more"
        )
    shard: list[int] = []
    filled = 0
    for file, count in enumerate(rows):
        if filled + count > rows_max:
            yield shard
            shard, filled = [], 0
        if count:
            shard.append(file)
            filled += count
    yield shard


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:03}.parquet"


def _manifest(folder: Path, of: str) -> dict[str, Any] | None:
    """Return the manifest in `folder`, or None if it is missing or of other files or options than `of`."""
    try:
        values: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return values if values.get("of") == of else None


def _hash_of(files: Sequence[Path], columns: LogColumns, rows_max: int) -> str:
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([stats, asdict(columns), rows_max]).encode()).hexdigest()


def _digest(paths: Sequence[Path], shards: list[list[int]]) -> str:
    digest = hashlib.sha256(json.dumps(shards).encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
