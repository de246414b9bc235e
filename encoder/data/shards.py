"""A log bigger than memory, streamed from Parquet into shards of whole users, each of which fits into memory.

Users are spread over files by a hash of their id, rows stay in the order of the log, and a shard is some of the files.
So a shard is read like any other log, a user's sequence lies in one of them, and each is a sample of the users.
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
    parquet_files,
    read_log,
    readable,
    times_ms,
)
from encoder.distributed import is_main_process

FOLDER = "log-shards"
MANIFEST = "shards.json"
FILES_PER_SHARD, FILES_MAX = 4, 512
"""Several files fill a shard well whatever the hash gave each of them; all of them are open at once."""
BATCH_ROWS, GULP_ROWS = 1 << 16, 1 << 21
"""Rows decoded at once, and rows spread over the files at once."""
TELL_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class Shards:
    """A log in S shards, read one at a time."""

    folder: Path
    columns: LogColumns
    tell: Callable[[str], None]
    """Hears which shard is read."""
    of: str
    """A hash of the log's files and of how they were cut up."""
    digest: str
    """A hash of what the shards hold."""
    rows: int
    end_ms: int
    """The first event time behind all actions."""
    action_names: Sequence[str]
    """Names that occur in the whole log, most frequent first."""
    surface_names: Sequence[str]
    shards: Sequence[Sequence[int]]
    """[S] numbers of the files of each."""

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, number: int) -> ActionLog:
        """Shard `number`, from 0. Raises `LogError`."""
        self.tell(f"reading shard {number + 1} of {len(self)}")
        with readable(self.folder):
            files = [_file(self.folder, file) for file in self.shards[number]]
            return log_from_table(pyarrow.parquet.read_table(files, partitioning=None), self.columns)

    def remove(self) -> None:
        """Remove the shards from disk."""
        shutil.rmtree(self.folder, ignore_errors=True)


def open_log(
    path: Path, columns: LogColumns, *, rows_max: int, folder: Path, tell: Callable[[str], None] = lambda _: None
) -> ActionLog | Shards:
    """The log at `path`, in memory if it has at most `rows_max` actions or is no Parquet, else in shards in `folder`.

    A shard has at most half as many. Shards of the same files, left behind by a process that was killed, are taken as
    they are. Of several processes the first one writes and the others wait. `tell` hears every two seconds how far it
    is, and of each shard that is read later. Raises `LogError`.
    """
    with readable(path):
        files = parquet_files(path)
        rows = sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
        if rows <= rows_max:
            return read_log(path, columns)
        of = _hash_of(files, columns, rows_max)
        if is_main_process() and _manifest(folder, of) is None:
            _Writer(files, columns, folder, rows, rows_max // 2, tell).write(of)
    while (manifest := _manifest(folder, of)) is None:
        time.sleep(0.2)
    return Shards(folder=folder, columns=columns, tell=tell, **manifest)


class _Writer:
    """Streams the files of a log into shards of at most `shard_rows` rows."""

    def __init__(
        self,
        files: Sequence[Path],
        columns: LogColumns,
        folder: Path,
        rows: int,
        shard_rows: int,
        tell: Callable[[str], None],
    ) -> None:
        self._files, self._columns, self._folder, self._tell = files, columns, folder, tell
        self._rows, self._shard_rows = rows, shard_rows
        self._count = min(FILES_MAX, -(-rows * FILES_PER_SHARD // shard_rows))
        self._actions: Counter[str] = Counter()
        self._surfaces: Counter[str] = Counter()
        self._end_ms = 0

    def write(self, of: str) -> None:
        """Write all shards, then the manifest. Raises `LogError` where there is no room, on disk or in a shard."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        needed, free = sum(file.stat().st_size for file in self._files), shutil.disk_usage(self._folder).free
        if needed > free:
            raise LogError(f"shards need {needed:,} bytes and {free:,} are free: make room or move {self._folder}")
        in_file = np.zeros(self._count, np.int64)
        paths = [_file(self._folder, number) for number in range(self._count)]
        done, told = 0, time.monotonic()
        with ExitStack() as stack:
            writers: list[Any] = []
            for gulp in _gulps(self._files, self._columns, min(GULP_ROWS, self._shard_rows)):
                if not writers:
                    writers = [stack.enter_context(pyarrow.parquet.ParquetWriter(path, gulp.schema)) for path in paths]
                in_file += self._spread(gulp, writers)
                done += len(gulp)
                if time.monotonic() - told >= TELL_EVERY_S:
                    told = time.monotonic()
                    self._tell(f"{done:,} of {self._rows:,} actions cut into shards")
        shards = list(_packed(in_file.tolist(), self._shard_rows))
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

    def _spread(self, gulp: pa.Table, writers: Sequence[Any]) -> I64:
        """Write each row to its user's file, in the order given; returns how many went to each file."""
        users, at = distinct(gulp, self._columns.user)
        file = np.array([item_key(user) % self._count for user in users], np.int64)[at]
        order = np.argsort(file, kind="stable")
        bounds = np.searchsorted(file[order], np.arange(self._count + 1))
        sorted_rows = gulp.take(order)
        for writer, first, last in zip(writers, bounds[:-1], bounds[1:], strict=True):
            if last > first:
                writer.write_table(sorted_rows.slice(first, last - first))
        self._end_ms = max(self._end_ms, int(times_ms(gulp, self._columns).max()) + 1)
        for name, counter in ((self._columns.action, self._actions), (self._columns.surface, self._surfaces)):
            if name:
                values, at = distinct(gulp, name)
                counter.update(dict(zip(values, np.bincount(at).tolist(), strict=True)))
        return np.diff(bounds)


def _gulps(files: Sequence[Path], columns: LogColumns, rows_max: int) -> Iterator[pa.Table]:
    """The rows of Parquet files in order, at most `rows_max` at once, ids and names as text."""
    held: list[pa.Table] = []
    schema = None
    for file in files:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(min(BATCH_ROWS, rows_max), columns=columns.named):
            table = _with_text(pa.Table.from_batches([batch]).select(columns.named), columns)
            schema = schema or table.schema
            if sum(map(len, held)) + len(table) > rows_max:
                yield pa.concat_tables(held)
                held = []
            held.append(table.cast(schema))
    yield pa.concat_tables(held)


def _with_text(table: pa.Table, columns: LogColumns) -> pa.Table:
    texts = {columns.user, columns.item, columns.action, columns.surface}
    return pa.table(
        {name: pc.cast(table[name], pa.string()) if name in texts else table[name] for name in table.column_names}
    )


def _packed(rows: Sequence[int], rows_max: int) -> Iterator[list[int]]:
    """Files in order, as many to a shard as fit. Raises `LogError` where one alone does not."""
    if max(rows) > rows_max:
        raise LogError(
            f"some users have too many actions for a shard: {max(rows):,}, {rows_max:,} fit; "
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
    """What was written last, if that was complete and of these files."""
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
