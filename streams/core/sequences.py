"""The sequences of one partition's hot users, in columns: exact order, no duplicates, the last M actions.

Events are applied in offset order with one of these outcomes:

- an event whose source offset is not beyond the user's last applied one, or whose `event_id` is among the kept
  actions, is a *duplicate*;
- an event not younger than the user's last tombstone is *forgotten* with the user it belonged to;
- an event older than everything kept in a full sequence is *too old*;
- all others are *applied*: by event time, after those of equal event time. One that is not the newest is *late*:
  later positions move up by one and the user's revision changes;
- a *tombstone* empties the sequence, and the user's revision changes.

Users whose events are plain appends, nearly all, are handled together in a few numpy calls (`_append`); the others
one by one in `streams.core.merge`, which is also the readable definition of the rules above.
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
        ("dirty_from", "<i8"),  # first position that is not durable
        ("job_offset", "<i8"),  # source offset of the last encode job
        ("since_job_ms", "<i8"),  # processing time of the first action since that job
        ("last_applied_ms", "<i8"),  # processing time of the last action
        ("wheel_ms", "<i8"),  # deadline of the user's earliest entry in the wheel, NEVER without one
        ("phase_ms", "<i8"),  # by which the user's deadlines are moved
        ("since_job", "<u4"),  # actions since that job
        ("used", "<u4"),  # number of the batch that last touched the user
        ("stored_keys", "<u2"),  # chunk keys that are stored
        ("dirty", "?"),  # differs from what is stored
        ("queued", "?"),  # handed over for encoding, not yet taken
        ("in_job", "?"),  # being encoded
        ("in_snapshot", "?"),  # being written by a checkpoint
        ("emptied", "?"),  # forgotten since the last checkpoint
    ],
    align=True,
)
"""What memory alone holds of a hot user."""

_APPLIED, _DUPLICATE, _FORGOTTEN = int(Outcome.APPLIED), int(Outcome.DUPLICATE), int(Outcome.FORGOTTEN)
"""As plain numbers: a look-up in an enum takes as long as a step of a small batch."""
_ACTION_BYTES = np.dtype("V32")
Outcomes = U8
_HEADER_BYTES = np.dtype(f"V{HEADER_DTYPE.itemsize}")
_LIVE_BYTES = np.dtype(f"V{LIVE_DTYPE.itemsize}")


class StateFull(StopsWorker):
    """More users would be hot than the limit allows; checkpoint and evict, then try again."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What a batch did."""

    slots: I64
    """[N], slot of each event's user."""
    outcomes: Outcomes
    """[N] of `Outcome`."""


class SequenceState:
    """Slots of hot users: a header, what memory alone holds, a ring of M actions and their event-id fingerprints.

    All columns are allocated at their limit at once; the system backs them with memory only where slots are used.
    """

    def __init__(self, limits: StateLimits) -> None:
        self.limits = limits
        slots, length = limits.hot_users_max, limits.sequence_length
        self.headers = np.zeros(slots, HEADER_DTYPE)
        self.live = np.zeros(slots, LIVE_DTYPE)
        self._header_bytes, self._live_bytes = self.headers.view(_HEADER_BYTES), self.live.view(_LIVE_BYTES)
        self._users = [b""] * slots
        self.slot_of: dict[bytes, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._ring = np.zeros(slots * length, ACTION_DTYPE)
        self._ring_bytes = self._ring.view(_ACTION_BYTES)
        self._fingerprints = np.zeros((slots, length), np.uint16)
        self._marked = np.zeros(slots, np.bool_)
        self._batch = 0

    # -- slots

    @property
    def room(self) -> int:
        """How many more users may become hot."""
        return len(self._free)

    def slots(self, users: Sequence[bytes]) -> I64:
        """Slots of hot users; KeyError for one that was not loaded."""
        return np.fromiter(map(self.slot_of.__getitem__, users), np.int64, len(users))

    def users_of(self, slots: I64) -> list[bytes]:
        """Whose `slots` are; all must be in use."""
        return [self._users[slot] for slot in slots.tolist()]

    def hot_slots(self) -> I64:
        """Every slot in use."""
        return np.fromiter(self.slot_of.values(), np.int64, len(self.slot_of))

    def columns(self, slots: I64) -> tuple[Columns, Columns]:
        """Copies of the headers and live columns of distinct `slots`; `put` writes them back."""
        return self.headers.take(slots), self.live.take(slots)

    def put(self, slots: I64, headers: Columns, live: Columns) -> None:
        """Write columns back. Rows are copied as plain bytes, which is five times faster than field by field."""
        self._header_bytes[slots] = headers.view(_HEADER_BYTES)
        self._live_bytes[slots] = live.view(_LIVE_BYTES)

    def load(self, users: Sequence[bytes], stored: StoredSequences, phases_ms: I64) -> I64:
        """Make cold users hot; return their slots. Raises `StateFull`."""
        if len(users) > self.room:
            raise StateFull(
                f"{len(users)} users more would be hot than hot_users_max = {self.limits.hot_users_max} allows: "
                "checkpoint and evict first, or raise the limit"
            )
        slots = np.array([self._free.pop() for _ in users], np.int64)
        for user, slot in zip(users, slots.tolist(), strict=True):
            self.slot_of[user] = slot
            self._users[slot] = user
        live = np.zeros(len(users), LIVE_DTYPE)
        headers = stored.headers.copy()
        headers["flags"] = np.where(headers["due_ms"] != NEVER, HAD_DEADLINE, 0)
        live["newest_ms"], live["wheel_ms"], live["job_offset"] = LONG_AGO, NEVER, -1
        live["phase_ms"], live["used"] = phases_ms, self._batch
        count = stored.headers["count"]
        live["dirty_from"] = count
        live["stored_keys"] = np.minimum(count // self.limits.chunk_length, self.limits.chunk_keys)
        kept = np.diff(stored.starts)
        has_actions = kept > 0
        live["newest_ms"][has_actions] = stored.actions["timestamp_ms"][stored.starts[1:][has_actions] - 1]
        self.put(slots, headers, live)
        self._fingerprints[slots] = 0
        self._write_rows(slots, count - kept, kept, stored.actions)
        return slots

    def drop(self, slots: I64) -> list[bytes]:
        """Free slots; return whose they were."""
        users = self.users_of(slots)
        for user in users:
            del self.slot_of[user]
        self.headers["due_ms"][slots] = NEVER  # an entry in the wheel may still point to the slot
        self._free.extend(slots[::-1].tolist())
        return users

    def least_recently_used(self, slots: I64, users_max: int) -> I64:
        """At most `users_max` of `slots`, those untouched for longest."""
        if len(slots) <= users_max:
            return slots
        return slots[np.argpartition(self.live["used"][slots], users_max)[:users_max]]

    # -- reading

    def rows(self, slots: I64, first: I64, lengths: I64) -> Actions:
        """Actions at the positions `first[i] ... first[i] + lengths[i] - 1` of each slot, one user after another."""
        owner, position = spans(first, lengths)
        return self._ring.take(self._cells(slots[owner], position))

    def kept(self, slots: I64) -> tuple[Actions, I64]:
        """The kept sequences, oldest first, and where each starts [U + 1]."""
        count = self.headers["count"][slots]
        lengths = np.minimum(count, self.limits.sequence_length)
        return self.rows(slots, count - lengths, lengths), starts_of(lengths)

    # -- applying

    def apply(self, batch: ActionBatch) -> Applied:
        """Apply a batch whose users are all hot."""
        self._batch += 1
        slots = self.slots(batch.users)
        outcomes = np.zeros(len(slots), np.uint8)
        slow = self._judge(batch, slots, outcomes)
        fast = rows_where(~slow & (outcomes == _APPLIED))
        self._append(batch, slots, fast[np.argsort(slots[fast], kind="stable")])
        if slow.any():
            self._merge(batch, slots, outcomes, rows_where(slow))
        return Applied(slots, outcomes)

    def _judge(self, batch: ActionBatch, slots: I64, outcomes: Outcomes) -> Bool:
        """Set the outcome of events that are certain to be dropped; return which events need the slow path [N]."""
        times, ids = batch.actions["timestamp_ms"], batch.actions["event_id"]
        outcomes[(times <= self.headers["forgotten_ms"][slots]) & ~batch.is_tombstone] = _FORGOTTEN
        outcomes[batch.offsets <= self.headers["applied_offset"][slots]] = _DUPLICATE
        suspect: Bool = batch.is_tombstone & (outcomes == _APPLIED)
        has_id = rows_where((ids != 0) & (outcomes == _APPLIED))
        if len(has_id):
            suspect[self._repeated_in_batch(ids, has_id)] = True
            suspect[self._repeated_in_kept(slots, ids, has_id, outcomes)] = True
        suspect[self._out_of_order(slots, times, rows_where(outcomes == _APPLIED))] = True
        if not suspect.any():
            return suspect
        # A user with one such event takes the slow path with all of them: only there is their order kept.
        self._marked[slots[suspect]] = True
        slow: Bool = self._marked[slots]
        self._marked[slots[suspect]] = False
        outcomes[slow] = _APPLIED
        return slow

    def _out_of_order(self, slots: I64, times: I64, rows: I64) -> I64:
        """Those of `rows` that are older than the newest action of their user before them."""
        by_user = rows[np.argsort(slots[rows], kind="stable")]
        before = np.empty(len(by_user), np.int64)
        before[1:] = times[by_user[:-1]]
        first = run_starts(slots[by_user])
        before[first] = self.live["newest_ms"][slots[by_user[first]]]
        late: I64 = by_user[times[by_user] < before]
        return late

    def _repeated_in_batch(self, ids: U64, rows: I64) -> I64:
        """Those of `rows` whose event id stands in the batch more than once."""
        in_order = np.sort(ids[rows])
        twice = in_order[1:][in_order[1:] == in_order[:-1]]
        repeated: I64 = rows[np.isin(ids[rows], twice)] if len(twice) else rows[:0]
        return repeated

    def _repeated_in_kept(self, slots: I64, ids: U64, rows: I64, outcomes: Outcomes) -> I64:
        """Set the outcome of `rows` that repeat a kept event id; return those whose twin may go during the batch."""
        found: I64 = rows[(self._fingerprints[slots[rows]] == _fingerprint(ids[rows])[:, None]).any(axis=1)]
        if not len(found):
            return found
        at, column = np.nonzero(self._fingerprints[slots[found]] == _fingerprint(ids[found])[:, None])
        twin = found[at]
        length = self.limits.sequence_length
        is_twin = self._ring["event_id"][slots[twin] * length + column] == ids[twin]
        twin, column = twin[is_twin], column[is_twin]
        count, events = self.headers["count"][slots[twin]], np.bincount(slots)[slots[twin]]
        position = count - 1 - (count - 1 - column) % length
        stays = position >= count + events - length
        outcomes[twin[stays]] = _DUPLICATE
        leaving: I64 = twin[~stays]
        return leaving

    def _append(self, batch: ActionBatch, slots: I64, rows: I64) -> None:
        """Append events, grouped by user and in order within each."""
        if not len(rows):
            return
        starts = run_starts(slots[rows])
        users = slots[rows[starts]]
        lengths = run_lengths(starts, len(rows))
        newest = rows[starts + lengths - 1]
        headers, live = self.columns(users)
        self._write_rows(users, headers["count"], lengths, batch.actions.take(rows))
        headers["count"] += lengths
        headers["applied_offset"] = batch.offsets[newest]
        live["newest_ms"] = batch.actions["timestamp_ms"][newest]
        live["dirty"], live["used"] = True, self._batch
        self.put(users, headers, live)

    def _merge(self, batch: ActionBatch, slots: I64, outcomes: Outcomes, rows: I64) -> None:
        """Apply the events of each user one by one."""
        by_user = rows[np.argsort(slots[rows], kind="stable")]
        for events in np.split(by_user, run_starts(slots[by_user])[1:]):
            outcomes[events] = self._merge_user(int(slots[events[0]]), batch, events)

    def _merge_user(self, slot: int, batch: ActionBatch, events: I64) -> list[Outcome]:
        one = np.array([slot])
        headers, live = self.columns(one)
        kept, _ = self.kept(one)
        merging = Merging(
            kept,
            int(headers["count"][0]),
            int(headers["applied_offset"][0]),
            int(headers["forgotten_ms"][0]),
            self.limits.sequence_length,
        )
        offsets, tombstones = batch.offsets[events].tolist(), batch.is_tombstone[events].tolist()
        rows, outcomes = merge(merging, batch.actions[events], offsets, tombstones)
        live["used"] = self._batch
        if merging.applied_offset != headers["applied_offset"][0]:
            live["dirty"] = True
            live["dirty_from"] = min(int(live["dirty_from"][0]), merging.changed_from)
            live["newest_ms"] = rows["timestamp_ms"][-1] if len(rows) else LONG_AGO
            headers["revision"] += np.uint32(merging.revisions)
            headers["count"], headers["applied_offset"] = merging.count, merging.applied_offset
            headers["forgotten_ms"] = merging.forgotten_ms
            if merging.emptied:
                self._empty(slot, live)
            self._write_rows(one, np.array([merging.count - len(rows)]), np.array([len(rows)]), rows)
        self.put(one, headers, live)
        return outcomes

    def _empty(self, slot: int, live: Columns) -> None:
        """Leave nothing of a forgotten user's actions in memory."""
        live["emptied"] = True
        length = self.limits.sequence_length
        self._ring[slot * length : (slot + 1) * length] = np.zeros(1, ACTION_DTYPE)
        self._fingerprints[slot] = 0

    def _write_rows(self, slots: I64, first: I64, lengths: I64, actions: Actions) -> None:
        """Put actions, one user after another, at the positions from `first` on; a repeated cell keeps the last."""
        owner, position = spans(first, lengths)
        cells = self._cells(slots[owner], position)
        self._ring_bytes[cells] = actions.view(_ACTION_BYTES)
        self._fingerprints.reshape(-1)[cells] = _fingerprint(actions["event_id"])

    def _cells(self, slots: I64, positions: I64) -> I64:
        length = self.limits.sequence_length
        cells: I64 = slots * length + positions % length
        return cells


def _fingerprint(ids: U64) -> npt.NDArray[np.uint16]:
    """16 bits of an event id, 0 only for "none": they sort out the ids that cannot be among the kept ones."""
    return np.where(ids == 0, 0, (ids & np.uint64(0xFFFF)) | np.uint64(1)).astype(np.uint16)
