"""The sequences of one partition's hot users, in columns: exact order, no duplicates, the last M actions.

Events are applied in offset order, each with one of these outcomes:

- *duplicate*: its source offset is not beyond the user's last applied one, or its `event_id` is among the kept actions;
- *forgotten*: it is not newer than the user's last tombstone;
- *too old*: the sequence is full, and everything kept is newer;
- *applied*: it is inserted by event time, after actions of equal event time;
- *late*: applied, but not as the newest; later positions move up by one, and the user's revision changes;
- *tombstone*: the sequence is emptied, and the user's revision changes.

Users whose events are plain appends, which is nearly all of them, are handled together in a few numpy calls
(`_append`). The others are handled event by event in `streams.core.merge`, the readable definition of these rules.

Shapes: N events of a batch, U users, M kept actions per user (`sequence_length`). A *row* is a user's place in the hot
table; `events` are indices into the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from encoder.actions.columns import ACTION_DTYPE, ActionBatch, Actions
from encoder.arrays import I64, U8, U64, Bool
from streams.core.columns import Columns, rows_where, run_lengths, run_starts, spans, starts_of
from streams.core.layout import HAD_DEADLINE, HEADER_DTYPE, LONG_AGO, NEVER, StateLimits, StoredSequences
from streams.core.merge import Merging, Outcome, merge
from streams.errors import StopsWorker

LIVE_DTYPE = np.dtype(
    [
        ("newest_ms", "<i8"),  # event time of the newest kept action, LONG_AGO without one
        ("arrival_ms", "<i8"),  # arrival time of the last applied event, LONG_AGO if it was before the load
        ("dirty_from", "<i8"),  # first position that is not durable
        ("job_offset", "<i8"),  # source offset of the last encode job
        ("since_job_ms", "<i8"),  # processing time of the first action since that job
        ("last_applied_ms", "<i8"),  # processing time of the last action
        ("phase_ms", "<i8"),  # shift of the user's deadlines
        ("retry_ms", "<i8"),  # processing time until which a user waits that was shed or whose job failed
        ("since_job", "<u4"),  # actions since that job
        ("used", "<u4"),  # number of the batch that last touched the user
        ("stored_keys", "<u2"),  # chunk keys that are stored
        ("dirty", "?"),  # differs from what is stored
        ("queued", "?"),  # handed over for encoding, no job has taken it yet
        ("in_job", "?"),  # being encoded
        ("in_snapshot", "?"),  # being written by a checkpoint
        ("emptied", "?"),  # forgotten since the last checkpoint
        ("expired", "?"),  # forgotten because of the TTL, and without an action since
    ],
    align=True,
)
"""Columns of a hot user that are kept in memory only."""

_APPLIED, _DUPLICATE, _FORGOTTEN = int(Outcome.APPLIED), int(Outcome.DUPLICATE), int(Outcome.FORGOTTEN)
"""Plain ints: an enum lookup costs as much as one step of a small batch."""
_ACTION_BYTES = np.dtype("V32")
Outcomes = U8
_HEADER_BYTES = np.dtype(f"V{HEADER_DTYPE.itemsize}")
_LIVE_BYTES = np.dtype(f"V{LIVE_DTYPE.itemsize}")


class StateFull(StopsWorker):
    """Loading would exceed the limit of hot users; checkpoint and evict, then try again."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The outcome of a batch."""

    rows: I64
    """[N], row of each event's user in the hot table."""
    outcomes: Outcomes
    """[N] of `Outcome`."""
    expired: list[tuple[int, int]]
    """Row of each user that began a new sequence because of the TTL, and the offset before that."""


class SequenceState:
    """The hot table: per user a header, memory-only columns, a ring of M actions and their event-id fingerprints.

    All columns are allocated at their limit at once; the operating system backs only the rows in use with memory.

    Position p of the user in row r is in ring cell `r * M + p % M`. For M = 8 and count = 11:

        cell - r * M    0   1   2   3   4   5   6   7
        position        8   9  10   3   4   5   6   7     kept: 3 (oldest) to 10 (newest)
    """

    def __init__(self, limits: StateLimits) -> None:
        self.limits = limits
        rows, length = limits.hot_users_max, limits.sequence_length
        self.headers = np.zeros(rows, HEADER_DTYPE)
        self.live = np.zeros(rows, LIVE_DTYPE)
        self._header_bytes, self._live_bytes = self.headers.view(_HEADER_BYTES), self.live.view(_LIVE_BYTES)
        self._users = [b""] * rows
        self.row_of: dict[bytes, int] = {}
        self._free = list(range(rows - 1, -1, -1))
        self._ring = np.zeros(rows * length, ACTION_DTYPE)
        self._ring_bytes = self._ring.view(_ACTION_BYTES)
        self._fingerprints = np.zeros((rows, length), np.uint16)
        self._marked = np.zeros(rows, np.bool_)
        self._batch = 0

    # -- rows

    @property
    def room(self) -> int:
        """Number of users that may still become hot."""
        return len(self._free)

    def rows_of(self, users: Sequence[bytes]) -> I64:
        """Return the rows of hot users; raise KeyError for a user that was not loaded."""
        return np.fromiter(map(self.row_of.__getitem__, users), np.int64, len(users))

    def users_of(self, rows: I64) -> list[bytes]:
        """Return the users in `rows`, all of which must be in use."""
        return [self._users[row] for row in rows.tolist()]

    def hot_rows(self) -> I64:
        """Return every row in use."""
        return np.fromiter(self.row_of.values(), np.int64, len(self.row_of))

    def columns(self, rows: I64) -> tuple[Columns, Columns]:
        """Return copies of the headers and live columns of distinct `rows`; `put` writes them back."""
        return self.headers.take(rows), self.live.take(rows)

    def put(self, rows: I64, headers: Columns, live: Columns) -> None:
        """Write columns back, as plain bytes per row, which is five times faster than field by field."""
        self._header_bytes[rows] = headers.view(_HEADER_BYTES)
        self._live_bytes[rows] = live.view(_LIVE_BYTES)

    def load(self, users: Sequence[bytes], stored: StoredSequences, phases_ms: I64) -> I64:
        """Make cold users hot and return their rows; raise `StateFull` when they do not fit."""
        if len(users) > self.room:
            raise StateFull(
                f"loading {len(users)} users would exceed hot_users_max = {self.limits.hot_users_max}: "
                "checkpoint and evict first, or raise the limit"
            )
        rows = np.array([self._free.pop() for _ in users], np.int64)
        for user, row in zip(users, rows.tolist(), strict=True):
            self.row_of[user] = row
            self._users[row] = user
        live = np.zeros(len(users), LIVE_DTYPE)
        headers = stored.headers.copy()
        headers["flags"] = np.where(headers["due_ms"] != NEVER, HAD_DEADLINE, 0)
        live["newest_ms"], live["arrival_ms"], live["job_offset"] = LONG_AGO, LONG_AGO, -1
        live["phase_ms"], live["used"] = phases_ms, self._batch
        count = stored.headers["count"]
        live["dirty_from"] = count
        live["stored_keys"] = np.minimum(count // self.limits.chunk_length, self.limits.chunk_keys)
        kept = np.diff(stored.starts)
        has_actions = kept > 0
        live["newest_ms"][has_actions] = stored.actions["timestamp_ms"][stored.starts[1:][has_actions] - 1]
        self.put(rows, headers, live)
        self._fingerprints[rows] = 0
        self._write_actions(rows, count - kept, kept, stored.actions)
        return rows

    def drop(self, rows: I64) -> list[bytes]:
        """Free rows and return the users that were in them."""
        users = self.users_of(rows)
        for user in users:
            del self.row_of[user]
        self.headers["due_ms"][rows] = NEVER  # an entry in the wheel may still point to the row
        self._free.extend(rows[::-1].tolist())
        return users

    def least_recently_used(self, rows: I64, users_max: int) -> I64:
        """Return at most `users_max` of `rows`, those untouched for longest."""
        if len(rows) <= users_max:
            return rows
        return rows[np.argpartition(self.live["used"][rows], users_max)[:users_max]]

    # -- reading

    def actions_at(self, rows: I64, first: I64, lengths: I64) -> Actions:
        """Return the actions at positions `first[i] ... first[i] + lengths[i] - 1` of each row, user by user."""
        owner, position = spans(first, lengths)
        return self._ring.take(self._cells(rows[owner], position))

    def kept(self, rows: I64) -> tuple[Actions, I64]:
        """Return the kept sequences, oldest first, and where each starts [U + 1]."""
        count = self.headers["count"][rows]
        lengths = np.minimum(count, self.limits.sequence_length)
        return self.actions_at(rows, count - lengths, lengths), starts_of(lengths)

    # -- applying

    def apply(self, batch: ActionBatch) -> Applied:
        """Apply a batch whose users are all hot."""
        self._batch += 1
        rows = self.rows_of(batch.users)  # [N]
        outcomes = np.zeros(len(rows), np.uint8)
        slow = self._judge(batch, rows, outcomes)
        fast = rows_where(~slow & (outcomes == _APPLIED))
        self._append(batch, rows, fast[np.argsort(rows[fast], kind="stable")])
        expired = self._merge(batch, rows, outcomes, rows_where(slow)) if slow.any() else []
        return Applied(rows, outcomes, expired)

    def _judge(self, batch: ActionBatch, rows: I64, outcomes: Outcomes) -> Bool:
        """Set the outcome of events that are certain to be dropped; return which events need the slow path [N]."""
        times, ids = batch.actions["timestamp_ms"], batch.actions["event_id"]
        outcomes[(times <= self.headers["forgotten_ms"][rows]) & ~batch.is_tombstone] = _FORGOTTEN
        outcomes[batch.offsets <= self.headers["applied_offset"][rows]] = _DUPLICATE
        suspect: Bool = batch.is_tombstone & (outcomes == _APPLIED)
        has_id = rows_where((ids != 0) & (outcomes == _APPLIED))
        if len(has_id):
            suspect[self._repeated_in_batch(ids, has_id)] = True
            suspect[self._repeated_in_kept(rows, ids, has_id, outcomes)] = True
        suspect[self._out_of_order(rows, times, rows_where(outcomes == _APPLIED))] = True
        if not suspect.any():
            return suspect
        # All events of a user with one suspect event take the slow path, because only there is their order kept.
        self._marked[rows[suspect]] = True
        slow: Bool = self._marked[rows]
        self._marked[rows[suspect]] = False
        outcomes[slow] = _APPLIED
        return slow

    def _out_of_order(self, rows: I64, times: I64, events: I64) -> I64:
        """Return those of `events` that are older than their user's newest earlier action, or newer by the TTL."""
        by_user = events[np.argsort(rows[events], kind="stable")]
        before = np.empty(len(by_user), np.int64)  # event time just before each event, of the same user
        before[1:] = times[by_user[:-1]]
        first = run_starts(rows[by_user])  # each user's first event follows what is kept, not its neighbour
        before[first] = self.live["newest_ms"][rows[by_user[first]]]
        apart = times[by_user] < before
        if ttl_ms := self.limits.user_ttl_ms:
            apart |= (before != LONG_AGO) & (times[by_user] - before >= ttl_ms)
        out: I64 = by_user[apart]
        return out

    def _repeated_in_batch(self, ids: U64, events: I64) -> I64:
        """Return those of `events` whose event id occurs in the batch more than once."""
        in_order = np.sort(ids[events])
        twice = in_order[1:][in_order[1:] == in_order[:-1]]
        repeated: I64 = events[np.isin(ids[events], twice)] if len(twice) else events[:0]
        return repeated

    def _repeated_in_kept(self, rows: I64, ids: U64, events: I64, outcomes: Outcomes) -> I64:
        """Set the outcome of `events` that repeat a kept event id; return those whose original may leave the ring.

        Whether an event repeats an original that this batch may push out of the ring depends on the order of events,
        and only the slow path follows it.
        """
        # [E, M] fingerprints against [E, 1]: cheap, and for nearly all batches the end of the search
        found: I64 = events[(self._fingerprints[rows[events]] == _fingerprint(ids[events])[:, None]).any(axis=1)]
        if not len(found):
            return found
        at, cell = np.nonzero(self._fingerprints[rows[found]] == _fingerprint(ids[found])[:, None])
        repeat = found[at]
        length = self.limits.sequence_length
        is_equal = self._ring["event_id"][rows[repeat] * length + cell] == ids[repeat]  # fingerprints can collide
        repeat, cell = repeat[is_equal], cell[is_equal]
        count, pushing = self.headers["count"][rows[repeat]], np.bincount(rows)[rows[repeat]]
        position = count - 1 - (count - 1 - cell) % length  # the newest position p < count with p % M == cell
        stays = position >= count + pushing - length  # still kept after all events of the user have been appended
        outcomes[repeat[stays]] = _DUPLICATE
        leaving: I64 = repeat[~stays]
        return leaving

    def _append(self, batch: ActionBatch, rows: I64, events: I64) -> None:
        """Append `events`, which are grouped by user and in order within each."""
        if not len(events):
            return
        starts = run_starts(rows[events])  # [U]
        users = rows[events[starts]]  # [U], rows of the users
        lengths = run_lengths(starts, len(events))  # [U]
        newest = events[starts + lengths - 1]  # [U], each user's last event
        headers, live = self.columns(users)
        self._write_actions(users, headers["count"], lengths, batch.actions.take(events))
        headers["count"] += lengths
        headers["applied_offset"] = batch.offsets[newest]
        live["newest_ms"], live["arrival_ms"] = batch.actions["timestamp_ms"][newest], batch.arrival_ms[newest]
        live["dirty"], live["expired"], live["used"] = True, False, self._batch
        self.put(users, headers, live)

    def _merge(self, batch: ActionBatch, rows: I64, outcomes: Outcomes, events: I64) -> list[tuple[int, int]]:
        """Apply `events` user by user, and each user's events one by one; return the expired (see `Applied`)."""
        expired: list[tuple[int, int]] = []
        by_user = events[np.argsort(rows[events], kind="stable")]
        for of_user in np.split(by_user, run_starts(rows[by_user])[1:]):
            row = int(rows[of_user[0]])
            outcomes[of_user], expired_at = self._merge_user(row, batch, of_user)
            if expired_at is not None:
                expired.append((row, expired_at))
        return expired

    def _merge_user(self, row: int, batch: ActionBatch, events: I64) -> tuple[list[Outcome], int | None]:
        one = np.array([row])
        headers, live = self.columns(one)
        kept, _ = self.kept(one)
        merging = Merging(
            kept,
            int(headers["count"][0]),
            int(headers["applied_offset"][0]),
            int(headers["forgotten_ms"][0]),
            self.limits.sequence_length,
            self.limits.user_ttl_ms,
            self.limits.counts_too_old,
        )
        offsets, tombstones = batch.offsets[events].tolist(), batch.is_tombstone[events].tolist()
        actions, outcomes = merge(merging, batch.actions[events], offsets, tombstones)
        live["used"] = self._batch
        if merging.applied_offset != headers["applied_offset"][0]:
            live["dirty"], live["expired"] = True, False
            live["dirty_from"] = min(int(live["dirty_from"][0]), merging.changed_from)
            live["newest_ms"] = actions["timestamp_ms"][-1] if len(actions) else LONG_AGO
            live["arrival_ms"] = batch.arrival_ms[events[offsets.index(merging.applied_offset)]]
            headers["revision"] += np.uint32(merging.revisions)
            headers["count"], headers["applied_offset"] = merging.count, merging.applied_offset
            headers["forgotten_ms"] = merging.forgotten_ms
            if merging.emptied:
                live["emptied"] = True
                self.erase(one)
            self._write_actions(one, np.array([merging.count - len(actions)]), np.array([len(actions)]), actions)
        self.put(one, headers, live)
        return outcomes, merging.expired_at

    def erase(self, rows: I64) -> None:
        """Erase the actions of forgotten users from memory."""
        self._ring.reshape(-1, self.limits.sequence_length)[rows] = np.zeros(1, ACTION_DTYPE)
        self._fingerprints[rows] = 0

    def _write_actions(self, rows: I64, first: I64, lengths: I64, actions: Actions) -> None:
        """Write actions, user by user, at the positions from `first` on.

        More than M actions of a user wrap around the ring, so a cell occurs twice; numpy keeps the last value, which
        is the newest action.
        """
        owner, position = spans(first, lengths)
        cells = self._cells(rows[owner], position)
        self._ring_bytes[cells] = actions.view(_ACTION_BYTES)
        self._fingerprints.reshape(-1)[cells] = _fingerprint(actions["event_id"])

    def _cells(self, rows: I64, positions: I64) -> I64:
        """Return the ring cells of positions; see the map above."""
        length = self.limits.sequence_length
        cells: I64 = rows * length + positions % length
        return cells


def _fingerprint(ids: U64) -> npt.NDArray[np.uint16]:
    """Return 16 bits of each event id, 0 only for "no id"; unequal fingerprints prove unequal ids."""
    return np.where(ids == 0, 0, (ids & np.uint64(0xFFFF)) | np.uint64(1)).astype(np.uint16)
