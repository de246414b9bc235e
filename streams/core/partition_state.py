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

With a TTL, for users in memory, `offset` being that of the last record applied and `now_ms` a moment before it:

    effects = state.expire(users, now_ms, offset)   # publish tombstones, drop what is cached of effects.expired

Whenever `next_deadline_ms` has come:

    effects = state.fire_timers(now_ms)     # queue effects.due, load effects.to_load, then fire again

The encode queue begins each job once and ends it once:

    job = state.begin_job(users)            # the users that are still due, with their sequences as of now
    rows = state.drop_outdated(job)         # after encoding: ends the job of outdated users, returns the other rows
    state.finish_job(users, offsets, now_ms)    # the output topic has acknowledged the embeddings, or
    state.retry_job(job, now_ms, delay_ms)  # encoding or publishing failed: due again after the delay
    state.requeue(users, now_ms, delay_ms)  # shed from the queue before a job took them: due again after the delay

Where features are computed (`streams.core.features.partition`), a job has a second half, which is published first:

    job = state.feature_job(users, now_ms)  # of the users of a job, or of effects.refresh
    state.finish_feature_job(job, now_ms)   # the features topic has acknowledged it

A checkpoint (see streams.storage.checkpoint) begins once and ends once:

    snapshot = state.begin_checkpoint()
    state.commit_checkpoint(snapshot)       # the snapshot is durable, or
    state.abort_checkpoint(snapshot)        # it may not be

A user is *due* from the moment a trigger fires until `finish_job` acknowledges a source offset that covers what the
trigger wanted. Being due is part of the persisted state: a checkpoint need not wait for the encoder, and a crash
loses no due user. A user that was handed over is not handed over again before `begin_job` has taken it, unless for a
more valuable reason, so that the queue can move it up. It is not evicted before `finish_job`, `retry_job` or `requeue`
has returned it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from encoder.actions.columns import ActionBatch, SequenceBatch
from encoder.arrays import I64, U8
from streams.core import expiry, snapshots
from streams.core.columns import rows_where, run_lengths, run_starts
from streams.core.covered import ColdOutputs, cover, cover_found
from streams.core.deadlines import Deadlines
from streams.core.effects import Effects
from streams.core.features.partition import FeatureConfig, FeatureJob, PartitionFeatures
from streams.core.jobs import EncodeJob
from streams.core.layout import LONG_AGO, NEVER, Snapshot, StateLimits, StoredFeatures, StoredSequences
from streams.core.merge import Outcome
from streams.core.policy import TriggerPolicy
from streams.core.sequences import SequenceState
from streams.core.triggers import Touched, Triggers

SEED_USERS_PER_STEP = 100_000
"""Deadlines entered into the wheel at a time by `seed_deadlines`."""
_LATE, _TOO_OLD = int(Outcome.LATE), int(Outcome.TOO_OLD)
"""Plain ints: an enum lookup costs as much as one step of a small batch."""


class PartitionState:
    """Sequences, triggers and deadlines of one source partition."""

    def __init__(self, policy: TriggerPolicy, limits: StateLimits, features: FeatureConfig | None = None) -> None:
        self.policy, self.limits = policy, limits
        self._sequences = SequenceState(limits)
        self.features = PartitionFeatures(features, limits.hot_users_max) if features else None
        self._triggers = Triggers(policy)
        self._deadlines = Deadlines()
        self._cold_outputs = ColdOutputs()

    # -- who is in memory

    @property
    def hot_users(self) -> int:
        """Number of users in memory."""
        return len(self._sequences.row_of)

    @property
    def room(self) -> int:
        """Number of users that may still be loaded."""
        return self._sequences.room

    def missing(self, users: Sequence[bytes]) -> list[bytes]:
        """Return those of `users` that are not in memory, each once, in order of appearance."""
        cold = set(users).difference(self._sequences.row_of)
        return [user for user in dict.fromkeys(users) if user in cold] if cold else []

    def without_actions(self, users: Sequence[bytes]) -> int:
        """Return how many of `users`, who are in memory, have no action."""
        return int((self._sequences.headers["count"][self._sequences.rows_of(users)] == 0).sum())

    def load(
        self, users: Sequence[bytes], stored: StoredSequences, features: Sequence[StoredFeatures | None] = ()
    ) -> None:
        """Take cold users into memory, `stored` being aligned with `users`; raise `StateFull` beyond `room`.

        `features` is aligned too, or empty where no features are computed.
        """
        if not users:
            return
        rows = self._sequences.load(users, stored, self._phases_ms(users))
        if self.features:
            self.features.load(rows, stored, features or [None] * len(users))
        self._enter(rows)
        known, offsets = self._cold_outputs.take(users)
        if known:
            self._cover_found(rows[known], offsets)

    def evict(self, room: int, *, spare: Sequence[bytes] = ()) -> int:
        """Make room for at least `room` users, as far as clean, idle users allow; return how many were evicted.

        The users in `spare`, those of the current batch, stay. At least an eighth of all rows is freed at a time, so
        that choosing them costs little per user.
        """
        sequences = self._sequences
        if sequences.room >= room:
            return 0
        rows = sequences.hot_rows()
        live = sequences.live.take(rows)
        rows = rows[~(live["dirty"] | live["queued"] | live["in_job"] | live["in_snapshot"])]
        rows = np.setdiff1d(rows, sequences.rows_of([user for user in spare if user in sequences.row_of]))
        wanted = max(room, self.limits.hot_users_max // 8) - sequences.room
        rows = sequences.least_recently_used(rows, wanted)
        due_ms = self._look_at_ms(rows)
        users = sequences.drop(rows)
        if self.features:
            self.features.drop(rows)
        waiting = rows_where(due_ms != NEVER)
        self._deadlines.add_cold([users[index] for index in waiting.tolist()], due_ms[waiting])
        return len(users)

    # -- events and deadlines

    def apply(self, batch: ActionBatch, now_ms: int) -> Effects:
        """Apply a batch and fire triggers; raise KeyError if a user of the batch is not in memory."""
        applied = self._sequences.apply(batch)
        forgotten, forgotten_offsets, expired = expiry.forget(self._sequences, batch, applied)
        is_applied = applied.outcomes <= _LATE  # APPLIED or LATE
        if self.features:
            self.features.apply(batch, applied)
            is_applied |= applied.outcomes == _TOO_OLD
        events = rows_where(is_applied)
        events = events[np.argsort(applied.rows[events], kind="stable")]
        due = self._fire(batch, applied.rows[events], events, now_ms) if len(events) else events
        return self._effects(due, forgotten, forgotten_offsets, [], applied.outcomes, expired)

    def expire(self, users: Sequence[bytes], now_ms: int, offset: int) -> Effects:
        """Forget those of distinct hot `users` whose newest action is the TTL old; `offset` is the last one applied."""
        rows = expiry.overdue(self._sequences, self._sequences.rows_of(users), now_ms, offset)
        expiry.empty(self._sequences, rows)
        if self.features:
            self.features.clear(rows)
        names, offsets = self._sequences.users_of(rows), np.full(len(rows), offset)
        forgotten = expiry.end_triggers(self._sequences, names, rows, offsets)
        none = np.zeros(0, np.int64)
        return self._effects(none, *forgotten, [], np.zeros(0, np.uint8), names)

    def fire_timers(self, now_ms: int) -> Effects:
        """Fire the timers that have fallen due by `now_ms`, at most `wake_users_max` users at a time."""
        popped, cold = self._deadlines.pop(now_ms, self.limits.wake_users_max)
        headers, live = self._sequences.columns(popped)
        is_time = np.maximum(headers["due_ms"], live["retry_ms"]) <= now_ms
        rows = popped[is_time & ~live["queued"] & ~live["in_job"]]
        headers, live = self._sequences.columns(rows)
        before = headers.copy()
        go = self._triggers.on_deadline(headers, live, now_ms)
        # A user that is handed over again, after it was shed or its job failed, differs in `last_encoded_ms` only. That
        # is not worth a record: users that are shed every second would be written to the changelog every second.
        for column in ("reason", "due_offset", "due_ms"):
            live["dirty"] |= headers[column] != before[column]
        self._sequences.put(rows, headers, live)
        refresh = self._refresh_now(popped, now_ms)
        self._enter(popped)
        none = np.zeros(0, np.int64)
        effects = self._effects(rows[go], [], none, self.missing(cold), np.zeros(0, np.uint8))
        return replace(effects, refresh=refresh) if refresh else effects

    @property
    def next_deadline_ms(self) -> int | None:
        """Processing time at which `fire_timers` next has work, None when nothing is pending."""
        return self._deadlines.next_ms

    @property
    def deadline_entries(self) -> int:
        """Number of entries in the wheel, which the number of users bounds."""
        return len(self._deadlines)

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
        rows = sequences.rows_of([user for user in users if user in sequences.row_of])
        sequences.live["queued"][rows] = False
        is_due = sequences.headers["reason"][rows] != 0
        self._enter(rows[~is_due])
        rows = rows[is_due]
        headers, live = sequences.columns(rows)
        live["in_job"] = True
        live["job_offset"], live["since_job"] = headers["applied_offset"], 0
        sequences.put(rows, headers, live)
        actions, starts = sequences.kept(rows)
        batch = SequenceBatch(
            users=sequences.users_of(rows),
            actions=actions,
            starts=starts,
            counts=headers["count"].copy(),
            revisions=headers["revision"].astype(np.int64),
        )
        columns = headers["applied_offset"], live["newest_ms"], headers["reason"], live["arrival_ms"]
        offsets, newest_ms, reasons, arrival_ms = (column.copy() for column in columns)
        return EncodeJob(batch, offsets, newest_ms, reasons, arrival_ms)

    def drop_outdated(self, job: EncodeJob) -> I64:
        """End the job of users forgotten or published since it began; return the rows of `job` to publish."""
        users = job.sequences.users
        hot = self._hot(users)
        rows, offsets = self._sequences.rows_of([users[index] for index in hot.tolist()]), job.offsets[hot]
        is_outdated = offsets <= self._sequences.headers["encoded_offset"][rows]
        self._end_job(rows[is_outdated], offsets[is_outdated])
        self._enter(rows[is_outdated])
        return hot[~is_outdated]

    def finish_job(self, users: Sequence[bytes], offsets: I64, now_ms: int) -> None:
        """Record that the output topic acknowledged embeddings of distinct `users` that contain these source offsets.

        Users evicted in the meantime (because a later job of theirs ended first) are recorded as by `seed_published`.
        """
        hot = self._hot(users)
        if len(hot) < len(users):
            cold = np.delete(np.arange(len(users)), hot)
            self.seed_published([users[index] for index in cold.tolist()], offsets[cold])
            users, offsets = [users[index] for index in hot.tolist()], offsets[hot]
        rows = self._sequences.rows_of(users)
        self._end_job(rows, offsets)
        headers, live = self._sequences.columns(rows)
        is_latest = live["job_offset"] == offsets
        headers["unencoded"] = np.where(is_latest, live["since_job"], headers["unencoded"])
        headers["first_unencoded_ms"] = np.where(is_latest, live["since_job_ms"], headers["first_unencoded_ms"])
        headers["last_encoded_ms"] = now_ms
        cover(headers, offsets)
        self._triggers.set_timers(headers, live)
        live["dirty"] = True
        self._sequences.put(rows, headers, live)
        self._enter(rows)

    def requeue(self, users: Sequence[bytes], now_ms: int, delay_ms: int) -> None:
        """Put back distinct `users` that the encode queue shed: those still due are handed over after the delay.

        They were not encoded, so no cooldown holds them back.
        """
        self._delay(users, "queued", now_ms + delay_ms)

    def retry_job(self, job: EncodeJob, now_ms: int, delay_ms: int) -> None:
        """End a failed job: its users who are still due are due again after the delay, unless a later job has them."""
        users = job.sequences.users
        hot = self._hot(users)
        rows = self._sequences.rows_of([users[index] for index in hot.tolist()])
        latest = hot[self._sequences.live["job_offset"][rows] == job.offsets[hot]]
        self._delay([users[index] for index in latest.tolist()], "in_job", now_ms + delay_ms)

    def seed_published(self, users: Sequence[bytes], offsets: I64) -> None:
        """Record up to which source offsets the output topic holds embeddings of distinct `users` by this encoder.

        A replay up to there publishes nothing again (invariant 5: monotone). `fire_timers` asks for the cold users
        among them to be loaded, and loading writes the offset into their state. Until then `has_unseen_outputs` is
        true, and a checkpoint's mark must not pass these outputs.
        """
        hot = self._hot(users)
        if len(hot):
            self._cover_found(self._sequences.rows_of([users[index] for index in hot.tolist()]), offsets[hot])
        cold = self.missing(users)
        self._deadlines.add_cold(cold, np.zeros(len(cold), np.int64))
        for index in np.delete(np.arange(len(users)), hot).tolist() if cold else ():
            self._cold_outputs.add(users[index], int(offsets[index]))

    # -- features

    def feature_job(self, users: Sequence[bytes], now_ms: int) -> FeatureJob:
        """Return the features of those of distinct `users` that are in memory and have an action, as of now."""
        assert self.features is not None
        hot = [user for user in users if user in self._sequences.row_of]
        rows = self._sequences.rows_of(hot)
        headers, live = self._sequences.columns(rows)
        if not (headers["count"] > 0).all():
            acting = rows_where(headers["count"] > 0)
            return self.feature_job([hot[index] for index in acting.tolist()], now_ms)
        return self.features.job(hot, rows, headers, live["newest_ms"].copy(), now_ms)

    def finish_feature_job(self, job: FeatureJob, now_ms: int) -> None:
        """Record that the features topic has acknowledged a job, and set when its users are refreshed.

        Users that were forgotten in the meantime are not.
        """
        assert self.features is not None
        hot = self._hot(job.users)
        rows = self._sequences.rows_of([job.users[index] for index in hot.tolist()])
        is_acting = self._sequences.headers["count"][rows] > 0
        hot, rows = hot[is_acting], rows[is_acting]
        changed = self.features.plan(rows, job.records.valid_until_ms[hot], job.newest_event_ms[hot], now_ms)
        self._sequences.live["dirty"][changed] = True
        self._enter(rows)

    def _refresh_now(self, rows: I64, now_ms: int) -> list[bytes]:
        """Return which users in `rows` are to be refreshed; those that are due are published without that.

        A user waits of whom something newer is published than the state has: the tombstone of an expiry that a crash
        has undone, or what a replay has not reached.
        """
        if not self.features:
            return []
        headers, live = self._sequences.columns(rows)
        idle = rows[~live["queued"] & ~live["in_job"] & (headers["count"] > 0) & (headers["reason"] == 0)]
        due = self.features.due(idle, now_ms)
        headers = self._sequences.headers[due]
        return self._sequences.users_of(due[headers["encoded_offset"] <= headers["applied_offset"]])

    # -- checkpoints

    @property
    def has_unseen_outputs(self) -> bool:
        """True while `seed_published` has recorded outputs that the state of their users does not contain yet."""
        return bool(self._cold_outputs)

    @property
    def is_dirty(self) -> bool:
        """True when anything has changed since the last snapshot."""
        return bool(self._sequences.live["dirty"].any())

    def begin_checkpoint(self) -> Snapshot:
        """Return all that changed since the last snapshot; its users stay in memory until the checkpoint ends."""
        snapshot = snapshots.begin(self._sequences)
        if not self.features:
            return snapshot
        rows = self._sequences.rows_of(snapshot.users)
        return replace(snapshot, features=self.features.pack(rows, snapshot.headers))

    def commit_checkpoint(self, snapshot: Snapshot) -> None:
        """Record that the snapshot is durable."""
        snapshots.commit(self._sequences, snapshot)

    def abort_checkpoint(self, snapshot: Snapshot) -> None:
        """Mark everything in the snapshot as changed again, because it may not be durable."""
        snapshots.abort(self._sequences, snapshot)
        if self.features:
            self.features.unpacked(self._sequences.rows_of(snapshot.users))

    # -- inside

    def _fire(self, batch: ActionBatch, rows: I64, events: I64, now_ms: int) -> I64:
        """Fire the triggers of applied `events`, grouped by user; return the rows of the users to hand over.

        `rows` [E] is the user's row of each event.
        """
        starts = run_starts(rows)  # [U]
        users, lengths = rows[starts], run_lengths(starts, len(events))  # [U], rows of the users and their events
        headers, live = self._sequences.columns(users)
        fresh = batch.offsets[events] > np.repeat(headers["encoded_offset"], lengths)  # [E], not yet published
        strong = fresh & self._triggers.strong_codes[batch.actions["action"][events]]
        touched = Touched(
            fresh=np.add.reduceat(fresh.astype(np.int64), starts),
            strong=np.logical_or.reduceat(strong, starts),
            first=headers["count"] - lengths < self.policy.first_n,
        )
        if self.features and not fresh.all():
            self.features.plan_found(users[(touched.fresh < lengths) & (headers["count"] > 0)])
        go = self._triggers.on_actions(headers, live, touched, now_ms)
        self._sequences.put(users, headers, live)
        self._enter(users)
        return users[go]

    def _delay(self, users: Sequence[bytes], ended: str, retry_ms: int) -> None:
        """End the live flag `ended` of users, and hold them back until `retry_ms` unless they are queued again.

        The delay is kept in memory only. What is stored of these users says that they are due, and that stays true.
        """
        rows = self._sequences.rows_of([users[index] for index in self._hot(users).tolist()])
        headers, live = self._sequences.columns(rows)
        live[ended] = False
        waits = (headers["reason"] != 0) & ~live["queued"]
        live["retry_ms"] = np.where(waits, retry_ms, live["retry_ms"])
        headers["last_encoded_ms"] = np.where(waits, LONG_AGO, headers["last_encoded_ms"])
        self._sequences.put(rows, headers, live)
        self._enter(rows)

    def _hot(self, users: Sequence[bytes]) -> I64:
        """Return the indices of those of `users` that are in memory."""
        return np.array([index for index, user in enumerate(users) if user in self._sequences.row_of], np.int64)

    def _cover_found(self, rows: I64, offsets: I64) -> None:
        """Record in the state of distinct users that embeddings up to `offsets` are in the output topic."""
        headers, live = self._sequences.columns(rows)
        cover_found(headers, offsets, has_timers=self.policy.has_timers)
        live["dirty"] = True
        self._sequences.put(rows, headers, live)
        if self.features:
            self.features.plan_found(rows[headers["count"] > 0])
            self._enter(rows)

    def _end_job(self, rows: I64, offsets: I64) -> None:
        """Clear `in_job`, except of users whose latest job is a later one."""
        latest = rows[self._sequences.live["job_offset"][rows] == offsets]
        self._sequences.live["in_job"][latest] = False

    def _enter(self, rows: I64) -> None:
        """Enter users that wait for a deadline into the wheel."""
        if not len(rows):
            return
        due_ms, live = self._look_at_ms(rows), self._sequences.live
        waiting = rows_where((due_ms != NEVER) & ~live["queued"][rows] & ~live["in_job"][rows])
        self._deadlines.add(rows[waiting], due_ms[waiting])

    def _look_at_ms(self, rows: I64) -> I64:
        """Return when each user is to be looked at: its deadline, but not before `retry_ms`; NEVER without one."""
        at_ms: I64 = np.maximum(self._sequences.headers["due_ms"][rows], self._sequences.live["retry_ms"][rows])
        if not self.features:
            return at_ms
        is_due = self._sequences.headers["reason"][rows] != 0  # published soon, and without a refresh
        return np.minimum(at_ms, np.where(is_due, NEVER, self.features.refresh_ms[rows]))

    def _phases_ms(self, users: Sequence[bytes]) -> I64:
        """Return a fixed shift per user, 0 to `spread_ms`, so that deadlines do not fall due all at once."""
        spread_ms = self.policy.spread_ms
        if not spread_ms:
            return np.zeros(len(users), np.int64)
        return np.fromiter(map(zlib.crc32, users), np.int64, len(users)) % spread_ms

    def _effects(
        self,
        due: I64,
        forgotten: list[bytes],
        offsets: I64,
        to_load: list[bytes],
        outcomes: U8,
        expired: Sequence[bytes] = (),
    ) -> Effects:
        """Build the effects; `due` are rows of users to hand over."""
        reasons = self._sequences.headers["reason"][due]
        priorities = self._triggers.priorities[reasons]
        users = self._sequences.users_of(due)
        return Effects(users, reasons, priorities, forgotten, offsets, to_load, outcomes, list(expired))
