"""Features of any (user, time) from a log of actions: what the stream would have had for that user at that time.

    log        ann  10:00 view   10:07 buy   10:09 view
    spine      ann, 10:07     the values after the view at 10:00: events at 10:07 or later do not count
    spine      bob, 10:07     a user without events has empty values

The values come from the state of the stream (`streams.batch.features`), fed in order of event time. So they are those
that the stream had as of then if no event came late. Two rules differ, because a log has no offsets and no deletions:

- A repeated event id of a user is dropped wherever its first occurrence is in the log. The stream looks for it among
  the kept actions only.
- Nobody is forgotten. Leave deleted users out of the log.

Shapes: N actions of a part of the log, U users of a chunk, Q rows of the spine.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet

from encoder.actions.columns import ACTION_DTYPE
from encoder.arrays import I64
from encoder.data.log import ActionLog, LogColumns, LogError
from encoder.data.shards import Shards, open_log
from infra.features.checks import OfflineError, check_columns, check_names, notes_on
from infra.features.ordered import OrderedRows
from infra.features.spine import AS_OF, MILLISECONDS_FROM, TIME_MAX_MS, USER, Spine, rows_by_user
from streams.batch.feature_table import schema, table
from streams.batch.features import Timeline, compute
from streams.core.columns import spans
from streams.core.features.definitions import FeatureSet, Kind
from streams.core.features.state import Attributes
from streams.features_kernel import load_functions

ROWS_IN_MEMORY_MAX = 10_000_000
CHUNK_ROWS = 65_536
"""Rows of a timeline that are computed at once."""
PROGRESS_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class Job:
    """What is computed from what."""

    features: FeatureSet
    attributes: Attributes
    log: Path
    columns: LogColumns
    spine: Spine
    out: Path
    rows_in_memory_max: int = ROWS_IN_MEMORY_MAX
    """Actions in memory, at about 300 bytes each; a larger Parquet log is divided on disk, by users."""


@dataclass(slots=True)
class Summary:
    """What was computed."""

    rows: int = 0
    """Rows of the spine."""
    users: int = 0
    """Different users of the spine."""
    unknown_users: int = 0
    """Users of the spine that do not act in the log."""
    events: int = 0
    """Actions of users of the spine before their last time."""
    unknown_items: int = 0
    """Different items of the log that the item attributes do not list, if there is a `last_k`: it shows their keys."""
    repeats: int = 0
    """Actions dropped because they repeat an event id of their user."""
    estimated_rows: int = 0
    """Rows with an estimate."""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    """What in the definitions matches nothing in the log."""


def check_output(out: Path, inputs: Sequence[Path]) -> None:
    """Raise `OfflineError` if the output cannot be written, before hours are spent on it."""
    problem = ""
    if out.suffix != ".parquet":
        problem = "its name must end in .parquet"
    elif out.is_dir():
        problem = "it is a folder"
    elif not out.parent.is_dir():
        problem = "its folder does not exist"
    elif any(out.resolve() == each.resolve() or each.resolve() in out.resolve().parents for each in inputs):
        problem = "it is an input too, or is in one"
    elif not os.access(out.parent, os.W_OK | os.X_OK):
        problem = "its folder cannot be written"
    if problem:
        raise OfflineError("output cannot be written", f"{out}: {problem}", "name another file with --out")


def compute_features(job: Job, progress: Callable[[str], None] = lambda _: None) -> Summary:
    """Write the values to `job.out`, whole or not at all; `progress` is called every two seconds.

    Raises `LogError`, and `OfflineError` if the log lacks what the definitions need.
    """
    began = time.monotonic()
    check_names(job.features, (USER, AS_OF))
    check_columns(job.features, job.columns)
    with _folder_beside(job.out) as folder:
        shards = folder / "shards"
        log = open_log(job.log, job.columns, rows_max=job.rows_in_memory_max, folder=shards, progress=progress)
        summary = Summary(len(job.spine), len(job.spine.users), notes=notes_on(job.features, log))
        rows = OrderedRows(folder)
        _Computation(job, summary, _Paced(progress)).run(log, rows)
        _write(job, rows, folder / job.out.name)
    summary.seconds = round(time.monotonic() - began, 3)
    return summary


class _Computation:
    """Computes the rows of the spine part by part of the log, each user in one part."""

    def __init__(self, job: Job, summary: Summary, progress: _Paced) -> None:
        self._job, self._summary, self._progress = job, summary, progress
        self._order, self._starts = rows_by_user(job.spine)
        self._last_ms = np.full(len(job.spine.users), -1)  # [users] last time that is asked for
        if len(job.spine):
            self._last_ms = job.spine.as_of_ms[self._order][self._starts[1:] - 1]
        self._number = {user: number for number, user in enumerate(job.spine.users)}
        self._places: deque[I64] = deque()
        """Rows of the spine that each batch of the timeline asks for, until they are answered."""
        self._unknown_items: set[int] = set()
        self._answered = 0

    def run(self, log: ActionLog | Shards, rows: OrderedRows) -> None:
        """Add the values of all rows of the spine to `rows`."""
        job, summary = self._job, self._summary
        for records in compute(self._timeline(log), job.features, job.attributes, load_functions()):
            found, places = table(records, job.features), self._places.popleft()
            summary.estimated_rows += sum(map(bool, records.estimated))
            rows.add(places, found)
            self._answered += len(places)
            self._progress(f"{self._answered:,} of {len(job.spine):,} rows, from {summary.events:,} actions")

        summary.unknown_items = len(self._unknown_items)

    def _timeline(self, log: ActionLog | Shards) -> Iterator[Timeline]:
        """Yield the timeline of every user of the spine, those without actions last."""
        waiting = set(range(len(self._job.spine.users)))
        for part in [log] if isinstance(log, ActionLog) else map(log.read, range(len(log))):
            _check_times(part)
            self._summary.repeats += part.repeats
            if any(each.kind is Kind.LAST_K for each in self._job.features.features):
                items = np.unique(part.actions["item"]).astype(np.int64)
                self._unknown_items.update(items[self._job.attributes.places(items) < 0].tolist())
            pairs = [(self._number[user], at) for at, user in enumerate(part.users.tolist()) if user in self._number]
            users, of_log = np.array(pairs, np.int64).reshape(-1, 2).T
            waiting.difference_update(users.tolist())
            yield from self._of_users(users, part, part.starts[of_log], part.starts[of_log + 1])
        self._summary.unknown_users = len(waiting)
        unknown = np.array(sorted(waiting), np.int64)
        nowhere = np.zeros(len(unknown), np.int64)
        yield from self._of_users(unknown, None, nowhere, nowhere)

    def _of_users(self, users: I64, part: ActionLog | None, first: I64, last: I64) -> Iterator[Timeline]:
        """Yield the timeline of users [U]; user u owns the actions of the part from first[u] to last[u]."""
        ends = np.cumsum(last - first + self._starts[users + 1] - self._starts[users])
        chunk = ends // CHUNK_ROWS  # [U] users of one chunk are computed together
        for low, high in _runs(chunk):
            rows, places = self._chunk(users[low:high], part, first[low:high], last[low:high])
            asked = np.cumsum(rows.is_query)
            for begin in range(0, len(rows), CHUNK_ROWS):
                batch = rows.slice(begin, begin + CHUNK_ROWS)
                asked_before = int(asked[begin - 1]) if begin else 0
                self._places.append(places[asked_before : asked_before + int(batch.is_query.sum())])
                yield batch

    def _chunk(self, users: I64, part: ActionLog | None, first: I64, last: I64) -> tuple[Timeline, I64]:
        """Return the timeline of a chunk of users, and the rows of the spine in the order of its queries."""
        asker, at = spans(self._starts[users], self._starts[users + 1] - self._starts[users])
        places = self._order[at]
        actor, row = spans(first, last - first)
        if part is not None:
            before = part.actions["timestamp_ms"][row] < self._last_ms[users][actor]
            actor, row = actor[before], row[before]
        self._summary.events += len(row)
        actions = np.zeros(len(row) + len(places), ACTION_DTYPE)
        values = np.full(len(actions), np.nan)
        if part is not None:
            actions[: len(row)] = part.actions[row]
            if part.values is not None:
                values[: len(row)] = part.values[row]
        actions["timestamp_ms"][len(row) :] = self._job.spine.as_of_ms[places]
        of_user = users[np.concatenate((actor, asker))]
        is_query = np.arange(len(actions)) >= len(row)
        order = np.lexsort((~is_query, actions["timestamp_ms"], of_user))  # stable: ties stay in order of arrival
        sorted_rows = Timeline(of_user[order], actions[order], values[order], is_query[order])
        return sorted_rows, places[order[is_query[order]] - len(row)]


def _runs(groups: I64) -> Iterator[tuple[int, int]]:
    """Yield the bounds of runs of equal values."""
    if len(groups):
        bounds = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
        yield from pairwise(bounds)


def _check_times(part: ActionLog) -> None:
    times = part.actions["timestamp_ms"]
    wrong = (times < MILLISECONDS_FROM) | (times > TIME_MAX_MS)
    if wrong.any():
        raise LogError(
            f"{int(wrong.sum()):,} of {len(times):,} event times are before 1980 or after the year 9999, such as "
            f"{int(times[wrong.argmax()])} ms; the stream rejects them: correct them, or give --time-unit s for seconds"
        )


def _write(job: Job, rows: OrderedRows, path: Path) -> None:
    """Write the result to `path`, then rename it to the output, so that no reader ever sees a part of it."""
    made = schema(job.features)
    spine = job.spine.table(0, 0)
    for name in reversed(spine):
        made = made.insert(0, pyarrow.field(name, spine[name].type))
    with pyarrow.parquet.ParquetWriter(path, made) as writer:
        for low, high, window in rows.windows():
            columns = {**job.spine.table(low, high), **dict(zip(window.column_names, window.columns, strict=True))}
            writer.write_table(pyarrow.table(columns, schema=made))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.replace(job.out)


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """Create a folder for intermediate files on the disk of the output, and remove it; one that was left is reused."""
    folder = out.with_name(f".{out.name}.part")
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Paced:
    """Passes on a text of progress if two seconds have passed since the last one."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show, self._shown = show, time.monotonic()

    def __call__(self, text: str) -> None:
        if time.monotonic() - self._shown >= PROGRESS_EVERY_S:
            self._shown = time.monotonic()
            self._show(text)
