"""The state of one source partition: batches in, effects out. Pure: no clock, no I/O; `now_ms` is processing time.

At assignment, once:

    state = PartitionState(policy, limits)
    state.seed_published(users, offsets)    # what the output topic holds beyond the checkpoint mark
    state.seed_deadlines(store.pending())   # deadlines of users that are not in memory

Each batch, without an await between the last `missing` and `apply`:

    cold = state.missing(batch.users)
    state.evict(len(cold), spare=batch.users)   # if state.room is still below len(cold): checkpoint, then start over
    state.load(cold, read_users(store, cold, limits).stored)
    effects = state.apply(batch, now_ms)        # queue effects.due, publish tombstones of effects.forgotten

Whenever `next_deadline_ms` has come:

    effects = state.fire_timers(now_ms)     # queue effects.due, load effects.to_load, then fire again

The encode queue begins each job once and ends it once:

    job = state.begin_job(users)            # the users that are still due, with their sequences as of now
    rows = state.drop_outdated(job)         # after encoding: ends the job of outdated users, returns the other rows
    state.finish_job(users, offsets, now_ms)    # the output topic has acknowledged the embeddings, or
    state.retry_job(users, now_ms, delay_ms)    # encoding or publishing failed: due again after the delay
    state.requeue(users, now_ms, delay_ms)  # shed from the queue before a job took them: due again after the delay

A checkpoint (see streams.storage.checkpoint) begins once and ends once:

    snapshot = state.begin_checkpoint()
    state.commit_checkpoint(snapshot)       # the snapshot is durable, or
    state.abort_checkpoint(snapshot)        # it may not be

A user is *due* from the moment a trigger fires until `finish_job` acknowledges a source offset that covers what the
trigger wanted. Being due is part of the persisted state: a checkpoint need not wait for the encoder, and a crash
loses no due user. A user that was handed over is not handed over again before `begin_job` has taken it, and is not
evicted before `finish_job`, `retry_job` or `requeue` has returned it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from encoder.actions.columns import ActionBatch, SequenceBatch
from encoder.arrays import I64, U8
from streams.core import snapshots
from streams.core.columns import Columns, rows_where, run_lengths, run_starts
from streams.core.deadlines import Deadlines
from streams.core.effects import Effects
from streams.core.jobs import EncodeJob
from streams.core.layout import NEVER, Snapshot, StateLimits, StoredSequences
from streams.core.merge import Outcome
from streams.core.policy import TriggerPolicy
from streams.core.sequences import Applied, SequenceState
from streams.core.triggers import Touched, Triggers

SEED_USERS_PER_STEP = 100_000
_LATE, _TOMBSTONE = int(Outcome.LATE), int(Outcome.TOMBSTONE)
"""As plain numbers: a look-up in an enum takes as long as a step of a small batch."""


class PartitionState:
    """Sequences, triggers and deadlines of one source partition."""

    def __init__(self, policy: TriggerPolicy, limits: StateLimits) -> None:
        self.policy, self.limits = policy, limits
        self._sequences = SequenceState(limits)
        self._triggers = Triggers(policy)
        self._deadlines = Deadlines()
        self._published: dict[bytes, int] = {}
        """Source offsets that the output topic holds of cold users, beyond what their state knows."""

    # -- who is in memory

    @property
    def hot_users(self) -> int:
        return len(self._sequences.slot_of)

    @property
    def room(self) -> int:
        """How many more users may be loaded."""
        return self._sequences.room

    def missing(self, users: Sequence[bytes]) -> list[bytes]:
        """Return those of `users` that are not in memory, each once, in order of appearance."""
        cold = set(users).difference(self._sequences.slot_of)
        return [user for user in dict.fromkeys(users) if user in cold] if cold else []

    def load(self, users: Sequence[bytes], stored: StoredSequences) -> None:
        """Take cold users into memory with their stored state, aligned; raises `StateFull` beyond `room`."""
        if not users:
            return
        slots = self._sequences.load(users, stored, self._phases_ms(users))
        self._enter(slots)
        for row, user in enumerate(users if self._published else ()):
            if user in self._published:
                self._note(slots[row : row + 1], self._published.pop(user))

    def evict(self, room: int, *, spare: Sequence[bytes] = ()) -> int:
        """Make room for at least `room` users, as far as clean, idle users allow; return how many were evicted.

        Users in `spare`, those of the batch at hand, stay. At least an eighth of all slots is freed at a time, so
        that choosing them costs little per user.
        """
        sequences = self._sequences
        if sequences.room >= room:
            return 0
        slots = sequences.hot_slots()
        live = sequences.live.take(slots)
        slots = slots[~(live["dirty"] | live["queued"] | live["in_job"] | live["in_snapshot"])]
        slots = np.setdiff1d(slots, sequences.slots([user for user in spare if user in sequences.slot_of]))
        wanted = max(room, self.limits.hot_users_max // 8) - sequences.room
        slots = sequences.least_recently_used(slots, wanted)
        due_ms = sequences.headers["due_ms"][slots]
        users = sequences.drop(slots)
        waiting = rows_where(due_ms != NEVER)
        self._deadlines.add_cold([users[row] for row in waiting.tolist()], due_ms[waiting])
        return len(users)

    # -- events and deadlines

    def apply(self, batch: ActionBatch, now_ms: int) -> Effects:
        """Apply a batch, all of whose users are in memory (KeyError otherwise), and fire triggers."""
        applied = self._sequences.apply(batch)
        forgotten, forgotten_offsets = self._forget(batch, applied)
        rows = rows_where(applied.outcomes <= _LATE)
        rows = rows[np.argsort(applied.slots[rows], kind="stable")]
        due = self._fire(batch, applied.slots[rows], rows, now_ms) if len(rows) else rows
        return self._effects(due, forgotten, forgotten_offsets, [], applied.outcomes)

    def fire_timers(self, now_ms: int) -> Effects:
        """Fire the timers that have fallen due by `now_ms`, at most `wake_users_max` users at a time."""
        popped, cold = self._deadlines.pop(now_ms, self.limits.wake_users_max)
        self._sequences.live["wheel_ms"][popped] = NEVER
        headers, live = self._sequences.columns(popped)
        slots = popped[(headers["due_ms"] <= now_ms) & ~live["queued"] & ~live["in_job"]]
        headers, live = self._sequences.columns(slots)
        go = self._triggers.on_deadline(headers, live, now_ms)
        live["dirty"] = True
        self._sequences.put(slots, headers, live)
        self._enter(popped)
        none = np.zeros(0, np.int64)
        return self._effects(slots[go], [], none, self.missing(cold), np.zeros(0, np.uint8))

    @property
    def next_deadline_ms(self) -> int | None:
        """Processing time at which `fire_timers` next has work, None when nothing is pending."""
        return self._deadlines.next_ms

    def seed_deadlines(self, pending: Iterable[tuple[bytes, int]]) -> None:
        """Enter the stored deadlines of users that are not in memory, as (user, due_ms)."""
        entries = iter(pending)
        while chunk := list(islice(entries, SEED_USERS_PER_STEP)):
            users = [user for user, _ in chunk]
            self._deadlines.add_cold(users, np.array([due_ms for _, due_ms in chunk], np.int64))

    # -- encoding

    def begin_job(self, users: Sequence[bytes]) -> EncodeJob:
        """Start encoding those of `users` that are still due; return them with their kept sequences."""
        sequences = self._sequences
        slots = sequences.slots([user for user in users if user in sequences.slot_of])
        sequences.live["queued"][slots] = False
        is_due = sequences.headers["reason"][slots] != 0
        self._enter(slots[~is_due])
        slots = slots[is_due]
        headers, live = sequences.columns(slots)
        live["in_job"] = True
        live["job_offset"], live["since_job"] = headers["applied_offset"], 0
        sequences.put(slots, headers, live)
        actions, starts = sequences.kept(slots)
        batch = SequenceBatch(
            users=sequences.users_of(slots),
            actions=actions,
            starts=starts,
            counts=headers["count"].copy(),
            revisions=headers["revision"].astype(np.int64),
        )
        return EncodeJob(batch, headers["applied_offset"].copy(), live["newest_ms"].copy(), headers["reason"].copy())

    def drop_outdated(self, job: EncodeJob) -> I64:
        """End the job of users forgotten or published since it began; return the rows that may still be published."""
        rows = self._hot_rows(job.sequences.users)
        slots, offsets = self._sequences.slots([job.sequences.users[row] for row in rows.tolist()]), job.offsets[rows]
        is_outdated = offsets <= self._sequences.headers["encoded_offset"][slots]
        self._end_job(slots[is_outdated], offsets[is_outdated])
        self._enter(slots[is_outdated])
        return rows[~is_outdated]

    def finish_job(self, users: Sequence[bytes], offsets: I64, now_ms: int) -> None:
        """Record that the output topic acknowledged embeddings of distinct `users` that contain these source offsets.

        Users evicted in the meantime (because a later job of theirs ended first) are recorded as by `seed_published`.
        """
        rows = self._hot_rows(users)
        if len(rows) < len(users):
            cold = np.delete(np.arange(len(users)), rows)
            self.seed_published([users[row] for row in cold.tolist()], offsets[cold])
            users, offsets = [users[row] for row in rows.tolist()], offsets[rows]
        slots = self._sequences.slots(users)
        self._end_job(slots, offsets)
        headers, live = self._sequences.columns(slots)
        is_latest = live["job_offset"] == offsets
        headers["unencoded"] = np.where(is_latest, live["since_job"], headers["unencoded"])
        headers["first_unencoded_ms"] = np.where(is_latest, live["since_job_ms"], headers["first_unencoded_ms"])
        headers["last_encoded_ms"] = now_ms
        self._covered(headers, offsets)
        self._triggers.set_timers(headers, live)
        live["dirty"] = True
        self._sequences.put(slots, headers, live)
        self._enter(slots)

    def requeue(self, users: Sequence[bytes], now_ms: int, delay_ms: int) -> None:
        """Put back distinct `users` that the encode queue shed: those still due are due again after the delay."""
        self._put_off(users, "queued", now_ms + delay_ms)

    def retry_job(self, users: Sequence[bytes], now_ms: int, delay_ms: int) -> None:
        """End the failed job of distinct `users`: those still due are due again after the delay."""
        self._put_off(users, "in_job", now_ms + delay_ms)

    def seed_published(self, users: Sequence[bytes], offsets: I64) -> None:
        """Record up to which source offsets the output topic holds embeddings of `users` by this encoder version.

        A replay up to there publishes nothing again (invariant 5: monotone). `fire_timers` asks for the cold users
        among them to be loaded, and loading writes the offset into their state. Until then `has_unseen_outputs` is
        true, and a checkpoint's mark must not pass these outputs.
        """
        cold = self.missing(users)
        self._deadlines.add_cold(cold, np.zeros(len(cold), np.int64))
        for user, offset in zip(users, offsets.tolist(), strict=True):
            slot = self._sequences.slot_of.get(user)
            if slot is None:
                self._published[user] = max(offset, self._published.get(user, -1))
            else:
                self._note(np.array([slot]), offset)

    # -- checkpoints

    @property
    def has_unseen_outputs(self) -> bool:
        """Whether `seed_published` recorded outputs that the state of their users does not contain yet."""
        return bool(self._published)

    @property
    def is_dirty(self) -> bool:
        """Whether anything has changed since the last snapshot."""
        return bool(self._sequences.live["dirty"].any())

    def begin_checkpoint(self) -> Snapshot:
        """Return all that changed since the last snapshot; its users stay in memory until the checkpoint ends."""
        return snapshots.begin(self._sequences)

    def commit_checkpoint(self, snapshot: Snapshot) -> None:
        """Record that the snapshot is durable."""
        snapshots.commit(self._sequences, snapshot)

    def abort_checkpoint(self, snapshot: Snapshot) -> None:
        """Mark everything in the snapshot as changed again, because it may not be durable."""
        snapshots.abort(self._sequences, snapshot)

    # -- inside

    def _fire(self, batch: ActionBatch, slots: I64, rows: I64, now_ms: int) -> I64:
        """Fire the triggers of applied `rows`, which are grouped by slot; return the slots to hand over."""
        starts = run_starts(slots)
        users, events = slots[starts], run_lengths(starts, len(rows))
        headers, live = self._sequences.columns(users)
        fresh = batch.offsets[rows] > np.repeat(headers["encoded_offset"], events)
        strong = fresh & self._triggers.strong_codes[batch.actions["action"][rows]]
        touched = Touched(
            fresh=np.add.reduceat(fresh.astype(np.int64), starts),
            strong=np.logical_or.reduceat(strong, starts),
            first=headers["count"] - events < self.policy.first_n,
        )
        go = self._triggers.on_actions(headers, live, touched, now_ms)
        self._sequences.put(users, headers, live)
        self._enter(users)
        return users[go]

    def _forget(self, batch: ActionBatch, applied: Applied) -> tuple[list[bytes], I64]:
        """Reset triggers of forgotten users; return whose tombstone must be published (once, also in a replay)."""
        rows = rows_where(applied.outcomes == _TOMBSTONE)
        if not len(rows):
            return [], rows
        last = {batch.users[row]: row for row in rows.tolist()}
        rows = np.array(list(last.values()), np.int64)
        slots, offsets = applied.slots[rows], batch.offsets[rows]
        headers, live = self._sequences.columns(slots)
        unknown = offsets > headers["encoded_offset"]
        headers["encoded_offset"] = np.maximum(headers["encoded_offset"], offsets)
        for column in ("reason", "unencoded", "first_unencoded_ms"):
            headers[column] = 0
        headers["due_ms"] = NEVER
        live["since_job"] = 0
        self._sequences.put(slots, headers, live)
        return [batch.users[row] for row in rows[unknown].tolist()], offsets[unknown]

    def _covered(self, headers: Columns, offsets: I64) -> None:
        """An embedding that contains `offsets` is in the output topic."""
        headers["encoded_offset"] = np.maximum(headers["encoded_offset"], offsets)
        done = headers["due_offset"] <= headers["encoded_offset"]
        headers["reason"] = np.where(done, 0, headers["reason"])
        headers["due_ms"] = np.where(done, NEVER, headers["due_ms"])

    def _put_off(self, users: Sequence[bytes], ended: str, due_ms: int) -> None:
        slots = self._sequences.slots([users[row] for row in self._hot_rows(users).tolist()])
        headers, live = self._sequences.columns(slots)
        live[ended], live["dirty"] = False, True
        waits = (headers["reason"] != 0) & ~live["queued"]
        headers["due_ms"] = np.where(waits, due_ms, headers["due_ms"])
        self._sequences.put(slots, headers, live)
        self._enter(slots)

    def _hot_rows(self, users: Sequence[bytes]) -> I64:
        return np.array([row for row, user in enumerate(users) if user in self._sequences.slot_of], np.int64)

    def _note(self, slot: I64, offset: int) -> None:
        headers, live = self._sequences.columns(slot)
        headers["encoded_offset"] = np.maximum(headers["encoded_offset"], offset)
        if headers["due_offset"] <= offset:
            headers["reason"] = 0
        if headers["applied_offset"] <= offset:
            headers["unencoded"] = 0
        # With actions left over, a deadline stays as it was: it may fire early, never late.
        if not headers["reason"] and not (headers["unencoded"] and self.policy.has_timers):
            headers["due_ms"] = NEVER
        live["dirty"] = True
        self._sequences.put(slot, headers, live)

    def _end_job(self, slots: I64, offsets: I64) -> None:
        latest = slots[self._sequences.live["job_offset"][slots] == offsets]
        self._sequences.live["in_job"][latest] = False

    def _enter(self, slots: I64) -> None:
        """Put users into the wheel whose deadline is before their earliest entry there."""
        if not len(slots):
            return
        due_ms, live = self._sequences.headers["due_ms"][slots], self._sequences.live
        rows = rows_where((due_ms < live["wheel_ms"][slots]) & ~live["queued"][slots] & ~live["in_job"][slots])
        if len(rows):
            live["wheel_ms"][slots[rows]] = due_ms[rows]
            self._deadlines.add(slots[rows], due_ms[rows])

    def _phases_ms(self, users: Sequence[bytes]) -> I64:
        spread_ms = self.policy.spread_ms
        if not spread_ms:
            return np.zeros(len(users), np.int64)
        return np.fromiter(map(zlib.crc32, users), np.int64, len(users)) % spread_ms

    def _effects(self, due: I64, forgotten: list[bytes], offsets: I64, to_load: list[bytes], outcomes: U8) -> Effects:
        reasons = self._sequences.headers["reason"][due]
        priorities = self._triggers.priorities[reasons]
        users = self._sequences.users_of(due)
        return Effects(users, reasons, priorities, forgotten, offsets, to_load, outcomes)
