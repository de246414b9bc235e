"""The checks of a simulation, after every step and at the end of a history.

The checks, by invariant of the design:

1. (parity) an embedding's items are those of the model at the source offset that the embedding states;
2. and 3. (exactly once, order) every user's sequence, in memory or in the store, equals the model's; a restore from the
   changelog yields the model's sequence at the committed offset; nobody writes to a partition that it has lost;
4. (freshness) a user with an unencoded action never waits longer than its policy allows, and in the end every user is
   covered by an output;
5. (monotone) per user and version, source offsets in the output topic increase strictly, except for what a woken worker
   had in flight, and for what was sent again because its acknowledgement was lost;
6. (no poison) exactly the malformed records are rejected, nothing ends the worker, and no partition stops for good;
7. (bounded) there are never more users in memory than the limit, and a strong action moves its user up in the queue;
8. (expiry) in histories with a TTL, users without an action for so long, and no others, are forgotten in every topic;
9. (features) the values of every record are those of the model at its source offset and time; an older source offset
   never follows a newer one; an embedding is published when features of its source offset, or newer ones, are
   acknowledged; a forgotten user has its tombstone in both topics before anything that follows;
10. (identity) a worker processes nothing of a source topic that its state is not derived from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from aiokafka.structs import TopicPartition

from encoder.actions.columns import Actions
from encoder.arrays import I64
from infra.harness.simulation import history as h
from infra.harness.simulation.broker import Broker, Record
from infra.harness.simulation.faust_app import APP
from infra.harness.simulation.features import FeatureOutput, expected, features_of
from infra.harness.simulation.machine import LIMITS, low_bits
from infra.harness.simulation.model import Model
from infra.harness.simulation.model import Sequence as Kept
from infra.harness.simulation.worker import DEAD, FEATURES, OUT, Worker
from streams.core.columns import Columns
from streams.core.deadlines import BUCKET_MS
from streams.core.features.partition import REFRESH_RETRY_MS
from streams.core.policy import Reason
from streams.engine.ownership import OwnedPartition
from streams.storage.reader import read_users
from streams.wire.embeddings import Message

NEVER_MS = 10**9
"""Stands for "no bound"."""


REFRESHED_MS = REFRESH_RETRY_MS + 2_000
"""Time within which a value that has changed is published: the longest `refresh_ms`, and one attempt that failed."""
SWEPT_MS = 5_000
"""Time within which a user who is too old is forgotten: more than two sweeps are apart."""


class Violation(AssertionError):
    """An invariant is violated."""


class Output(NamedTuple):
    """A record of the output topic; a tombstone has the version None."""

    user: bytes
    version: str | None
    offset: int
    items: tuple[int, ...]


class Checks:
    """What a simulation compares; the rest of the state is that of `Simulation`."""

    history: h.History
    broker: Broker
    worker: Worker
    version: int
    models: list[Model]
    _partition_of: dict[bytes, int]
    _foreign: set[int]
    _repeats: bool
    _checked_outputs: list[int]
    _checked_features: list[int]
    _newest_features: dict[bytes, tuple[int, int]]
    _published_features: dict[bytes, int]
    _last_features: dict[bytes, FeatureOutput]
    _acknowledged_features: dict[bytes, int]
    _tombstones: dict[tuple[str, bytes], int]
    _clock_went_back: bool
    _clock_max_ms: int
    _newest: dict[tuple[bytes, str | None], int]
    _published: dict[bytes, int]
    _trusted_ms: int
    _violation: Violation | None
    _next: dict[int, int]
    _ready_ms: dict[int, int]
    _unencoded: dict[bytes, list[tuple[int, int, bool]]]
    _handed_over_ms: dict[bytes, int]
    _put_back_ms: dict[bytes, int]

    def _clock_ms(self) -> int:
        """Return the time of the workers."""
        raise NotImplementedError

    # -- what is seen of the worker

    def on_restored(self, owned: OwnedPartition) -> None:
        """Check a partition that has just become ready, whose only state is the restored one."""
        partition = owned.tp.partition
        self._next[partition] = owned.next_offset
        self._ready_ms[partition] = self._clock_ms()
        for user in [user for user in self._unencoded if self._partition_of[user] == partition]:
            del self._unencoded[user]
        for user in [user for user in self._handed_over_ms if self._partition_of[user] == partition]:
            del self._handed_over_ms[user]
        try:
            self._check_restored(owned)
        except Violation as violation:
            self._violation = self._violation or violation

    def _check_restored(self, owned: OwnedPartition) -> None:
        committed = self.broker.committed.get((APP, TopicPartition(*owned.tp)), (0, ""))[0]
        if owned.next_offset != committed:
            raise Violation(f"{owned.tp} goes on at {owned.next_offset}, but {committed} is committed")
        if owned.state.hot_users:
            raise Violation("a partition is ready with users in memory")
        self._compare(owned)

    def _note_acknowledged(self, topic: str, messages: Sequence[Message]) -> None:
        for key, value, headers in messages if topic == FEATURES else ():
            if key is not None and value is not None:
                offset = int(dict(headers)["source-offset"])
                self._acknowledged_features[key] = max(offset, self._acknowledged_features.get(key, -1))
        if topic == OUT:
            users = [key for key, value, _ in messages if key is not None and value is not None]
            self._handed_over_ms |= dict.fromkeys(users, self._clock_ms())

    def _on_produced(self, producer: int, tp: TopicPartition, messages: Sequence[Message]) -> None:
        """Check that an embedding follows features of its source offset; frozen workers are not followed."""
        if tp.topic != OUT or not self.history.features or producer not in self.worker.link.producers:
            return
        for key, value, headers in messages:
            offset = int(dict(headers)["source-offset"])
            if key is not None and value is not None and self._acknowledged_features.get(key, -1) < offset:
                self._violation = self._violation or Violation(f"the embedding of {key!r}, {offset} precedes features")

    def on_handed_over(self, user: bytes, *, waits: bool) -> None:
        """Check the cooldown, which does not apply to a user that is moved up in the queue."""
        now_ms, cooldown_ms = self._clock_ms(), self.history.policy.cooldown_ms
        since_ms = self._handed_over_ms.get(user)
        if not waits and since_ms is not None and now_ms < since_ms + cooldown_ms:
            self._violation = self._violation or Violation(f"{user!r} was handed over within its cooldown")
        self._handed_over_ms[user] = now_ms

    def on_put_back(self, users: Sequence[bytes], until_ms: int) -> None:
        """Note that no cooldown applies to these users, and how long they are held back."""
        for user in users:
            self._handed_over_ms.pop(user, None)
            self._put_back_ms[user] = until_ms

    def _note_applied(self, owned: OwnedPartition) -> None:
        """Record since when users wait for an embedding, for the check of freshness."""
        partition, model = owned.tp.partition, self.models[owned.tp.partition]
        begin = self._next.get(partition, 0)
        for offset, event in enumerate(model.log[begin : owned.next_offset], begin):
            if event is None or model.at(event.user, offset + 1).changed_at != offset:
                continue
            if event.tombstone:
                self._unencoded.pop(event.user, None)
            elif offset > self._covered(event.user):
                self._unencoded.setdefault(event.user, []).append((offset, self._clock_ms(), event.strong))
        self._next[partition] = owned.next_offset

    def _covered(self, user: bytes) -> int:
        """Return up to which source offset a user need not be published again.

        Features that are published hold back what is older, so that nothing older follows them, until the replay
        reaches their own source offset.
        """
        return max(self._published.get(user, -1), self._published_features.get(user, -1) - 1)

    # -- the checks

    def _check(self) -> None:
        worker = self.worker
        if self._violation is not None:
            raise self._violation
        if worker.is_dead:
            raise Violation(f"the worker has ended itself: {worker.aborted}")
        for failure in worker.failures:
            raise Violation(f"a task of the worker has failed: {failure!r}") from failure
        for reason in worker.partitions.halted.values():
            if "the disk is full" not in reason and "was given up" not in reason:
                raise Violation(f"a partition is halted: {reason}")
        self._check_outputs()
        self._check_features()
        for owned in worker.partitions.ready.values():
            self._note_applied(owned)
        for owned in worker.partitions.ready.values():
            self._check_partition(owned)

    def _check_partition(self, owned: OwnedPartition) -> None:
        if owned.state.hot_users > LIMITS.hot_users_max:
            raise Violation(f"{owned.state.hot_users} users in memory")
        stable = self.broker.log(owned.tp).stable
        if self.worker.partitions.ends(owned)[0] > stable:
            raise Violation(f"progress is measured against more than the last stable offset, {stable}")
        self._compare(owned)
        if self.worker.is_flowing(owned):
            self._check_freshness(owned)
        self._check_promoted(owned)

    def _compare(self, owned: OwnedPartition) -> None:
        """Compare every sequence, in memory or in the store, with the model's after all records before the next."""
        state, model = owned.state._sequences, self.models[owned.tp.partition]
        hot = [user for user in model.past if user in state.row_of]
        rows = state.rows_of(hot)
        actions, starts = state.kept(rows)
        self._compare_all(model, hot, state.headers[rows], actions, starts, owned.next_offset)
        cold = [user for user in model.past if user not in state.row_of]
        read = read_users(owned.store, cold, LIMITS)
        if read.corrupt:
            raise Violation(f"corrupt in the store: {read.corrupt}")
        stored = read.stored
        self._compare_all(model, cold, stored.headers, stored.actions, stored.starts, owned.next_offset)

    def _compare_all(
        self, model: Model, users: list[bytes], headers: Columns, actions: Actions, starts: I64, offset: int
    ) -> None:
        items = actions["item"].tolist()
        counts, applied = headers["count"].tolist(), headers["applied_offset"].tolist()
        for row, user in enumerate(users):
            right = model.at(user, offset)
            kept = tuple(low_bits(item) for item in items[starts[row] : starts[row + 1]])
            is_forgotten = not counts[row] and model.is_expired(right, self._clock_max_ms)
            if is_forgotten and applied[row] in (right.changed_at, -1):
                continue
            if (kept, counts[row], applied[row]) != (right.items, right.count, right.changed_at):
                raise Violation(f"{user!r} has {kept} and header {headers[row]}, expected {right}")

    def _check_outputs(self) -> None:
        for partition, log in enumerate(self.broker.topics[OUT].logs):
            for offset in range(self._checked_outputs[partition], log.end):
                self._check_output(self.models[partition], log.records[offset])
            self._checked_outputs[partition] = log.end

    def _check_output(self, model: Model, record: Record) -> None:
        output = output_of(record)
        self._check_content(model, output)
        self._check_tombstone(OUT, model, record, output.offset)
        if record.writer not in self._foreign:
            newest = max(self._newest.get((output.user, v), -1) for v in (None, output.version or f"v{self.version}"))
            # A tombstone is repeated where only one of two topics has it. That of an expiry has the offset before the
            # event that shows it, which may be that of the user's last action.
            repeats_tombstones = self.history.features or self.history.user_ttl_ms > 0
            may_repeat = self._repeats or (output.version is None and repeats_tombstones)
            if output.offset < newest or (output.offset == newest and not may_repeat):
                raise Violation(f"{output} follows an output of offset {newest}")
            self._newest[output.user, output.version] = output.offset
        self._published[output.user] = max(output.offset, self._published.get(output.user, -1))
        waiting = self._unencoded.get(output.user)
        if waiting:
            self._unencoded[output.user] = [each for each in waiting if each[0] > output.offset]

    def _check_content(self, model: Model, output: Output) -> None:
        right = model.at(output.user, output.offset + 1)
        is_tombstone = output.version is None
        if is_tombstone and self._is_expiry(model, right, output.user, output.offset):
            return
        if (output.offset, output.items, is_tombstone) != (right.changed_at, right.items, not right.items):
            raise Violation(f"{output} differs from the expected {right}")

    def _is_expiry(self, model: Model, right: Kept, user: bytes, offset: int) -> bool:
        """Return whether a tombstone is that of a user without an action for the TTL: by the clock, or by the log."""
        following = model.log[offset + 1] if offset + 1 < len(model.log) else None
        by_log = following is not None and following.user == user and not following.tombstone
        return model.is_expired(right, self._clock_max_ms) or (
            by_log and following is not None and model.is_expired(right, following.timestamp_ms)
        )

    def _check_features(self) -> None:
        for partition, log in enumerate(self.broker.topics[FEATURES].logs):
            for offset in range(self._checked_features[partition], log.end):
                self._check_feature_record(self.models[partition], log.records[offset])
            self._checked_features[partition] = log.end

    def _check_feature_record(self, model: Model, record: Record) -> None:
        """Check values, as of the time and source offset that the record states, and its place among the others."""
        found = features_of(record)
        right = model.at(found.user, found.offset + 1)
        values = expected(right.seen, found.as_of_ms) if found.values is not None else None
        is_expiry = found.values is None and self._is_expiry(model, right, found.user, found.offset)
        must = right.changed_at, values, "{}", not right.seen
        if not is_expiry and (found.offset, found.values, found.completeness, found.values is None) != must:
            raise Violation(f"{found} differs from the expected {values} of {right}")
        self._check_tombstone(FEATURES, model, record, found.offset)
        last = self._last_features.get(found.user)
        if last is None or (found.offset, found.as_of_ms) >= (last.offset, last.as_of_ms):
            self._published_features[found.user] = found.offset
            self._last_features[found.user] = found
        if record.writer in self._foreign:
            return
        newest, as_of_ms = self._newest_features.get(found.user, (-1, 0))
        went_back = found.offset == newest and 0 < found.as_of_ms < as_of_ms and not self._clock_went_back
        if found.offset < newest or went_back:
            raise Violation(f"{found} follows features of offset {newest} as of {as_of_ms}")
        self._newest_features[found.user] = found.offset, found.as_of_ms

    def _check_tombstone(self, topic: str, model: Model, record: Record, offset: int) -> None:
        """What is published of a user who was forgotten follows the tombstone."""
        user = record.key or b""
        if record.value is None:
            self._tombstones[topic, user] = max(offset, self._tombstones.get((topic, user), -1))
            return
        forgotten = (each.changed_at for each in model.past[user] if not each.kept and each.changed_at <= offset)
        if self._tombstones.get((topic, user), -1) < max(forgotten, default=-1):
            raise Violation(f"{user!r} has a record in {topic} at {offset} without the tombstone before it")

    def _check_freshness(self, owned: OwnedPartition) -> None:
        worker, policy, state = self.worker, self.history.policy, owned.state._sequences
        wait_ms = 0 if policy.every_n == 1 else policy.max_staleness_ms or NEVER_MS
        for user, waiting in self._unencoded.items():
            if not waiting or self._partition_of[user] != owned.tp.partition:
                continue
            model = self.models[owned.tp.partition]
            if model.is_expired(model.at(user, owned.next_offset), self._clock_max_ms):
                continue
            row = state.row_of.get(user)
            if user in worker.queue._priority_of or (row is not None and state.live["in_job"][row]):
                self._put_back_ms[user] = max(self._clock_ms(), self._put_back_ms.get(user, 0))
                continue
            # A cooldown may have begun under an earlier worker, and a deadline on a clock that has been set back since.
            from_ms = max(self._ready_ms[owned.tp.partition], self._trusted_ms)
            cooled_ms = self._handed_over_ms.get(user, from_ms) + policy.cooldown_ms
            held_ms = max(self._put_back_ms.get(user, 0), worker.flows_since_ms(owned))
            bound_ms = max(waiting[0][1] + wait_ms, self._trusted_ms + wait_ms, cooled_ms, held_ms)
            if self._clock_ms() > bound_ms + 2 * BUCKET_MS:
                raise Violation(f"{user!r} has waited since {waiting[0][1]}; the bound was {bound_ms}, now it is later")

    def _check_promoted(self, owned: OwnedPartition) -> None:
        """A user that waits in the queue and has made a strong action waits at least at the priority of that reason."""
        policy, state = self.history.policy, owned.state._sequences
        if not policy.strong:
            return
        strong = len(policy.priorities) - policy.priorities.index(Reason.STRONG)
        waits_at = self.worker.queue._priority_of
        for user, waiting in self._unencoded.items():
            if user in waits_at and self._partition_of[user] == owned.tp.partition and waits_at[user] < strong:
                row = state.row_of[user]
                covered = max(int(state.live["job_offset"][row]), int(state.headers["encoded_offset"][row]))
                if any(is_strong and offset > covered for offset, _, is_strong in waiting):
                    raise Violation(f"{user!r} waits at priority {waits_at[user]} and has made a strong action")

    def _check_complete(self) -> None:
        """Check that everything was processed, and that every user is covered by an output."""
        ready = self.worker.partitions.ready
        for partition, model in enumerate(self.models):
            if partition not in ready or partition in self.worker.partitions.halted:
                raise Violation(f"partition {partition} does not go on: {self.worker.partitions.halted.copy()}")
            if ready[partition].next_offset != len(model.log):
                raise Violation(f"partition {partition} is at {ready[partition].next_offset} of {len(model.log)}")
            for user in model.past:
                right = model.at(user, len(model.log))
                if model.is_expired(right, self._clock_max_ms):
                    self._check_expired(model, user, right)
                    continue
                last = self._published.get(user, -1)
                if last != right.changed_at:
                    raise Violation(f"the last output of {user!r} has offset {last}, expected {right.changed_at}")
                last = self._published_features.get(user, -1)
                if self.history.features and last != right.changed_at:
                    raise Violation(f"the last features of {user!r} have offset {last}, expected {right.changed_at}")
                if self.history.features and self.history.refresh_ms and right.seen and not self._clock_went_back:
                    self._check_refreshed(user, right)

    def _check_expired(self, model: Model, user: bytes, right: Kept) -> None:
        """Check that a user who has been too old for longer than a sweep takes has its tombstone in every topic.

        The user of the last record stays: there is no source offset yet that its tombstone could have.
        """
        is_overdue = (
            right.changed_at < len(model.log) - 1
            and model.is_expired(right, self._clock_ms() - SWEPT_MS)
            and not self._clock_went_back
        )
        for topic in (OUT, FEATURES) if self.history.features and is_overdue else (OUT,) if is_overdue else ():
            if self._tombstones.get((topic, user), -1) < right.changed_at:
                raise Violation(f"{user!r} expired, and there is no tombstone in {topic}")

    def _check_refreshed(self, user: bytes, right: Kept) -> None:
        """Check that no value has changed by time alone since the last record, apart from the one that always does."""
        found, now_ms = self._last_features[user].values or {}, self._clock_ms()
        by_now, lately = expected(right.seen, now_ms), expected(right.seen, now_ms - REFRESHED_MS)
        if any(found[name] not in (by_now[name], lately[name]) for name in found if name != "since_buy"):
            raise Violation(
                f"the last features of {user!r} are {found} and were not refreshed; by now they are {by_now}"
            )

    def _check_rejected(self) -> None:
        for partition, (model, log) in enumerate(zip(self.models, self.broker.topics[DEAD].logs, strict=True)):
            headers = [dict(record.headers) for record in log.records.values()]
            rejected = {int(each["source-offset"]) for each in headers if each["error-reason"] != b"encoder-failed"}
            if rejected != model.malformed:
                raise Violation(
                    f"partition {partition}: rejected {sorted(rejected)}, malformed {sorted(model.malformed)}"
                )


def output_of(record: Record) -> Output:
    """Return the content of a record of the output topic."""
    headers = dict(record.headers)
    offset = int(headers["source-offset"])
    assert record.key is not None
    if record.value is None:
        return Output(record.key, None, offset, ())
    items = tuple(int(item) for item in np.frombuffer(record.value, "<f4").tolist() if item >= 0)
    return Output(record.key, headers["encoder-version"].decode(), offset, items)
