"""One history: a broker, a worker made of the product's parts, zombies, the model and the clock; and the checks.

Steps that reach the worker let it run until nothing more can happen at this time. Its outputs, the steps of its
checkpoints and its encoder wait until a step lets them through, so everything else can happen in between.

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
8. (identity) a worker processes nothing of a source topic that its state is not derived from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from aiokafka.errors import MessageSizeTooLargeError
from aiokafka.structs import TopicPartition

from encoder.actions.columns import Actions, item_key
from encoder.arrays import I64
from infra.harness.simulation import history as h
from infra.harness.simulation.broker import Broker, Log, Record
from infra.harness.simulation.clients import CHANGELOG, OUTPUT, REFUSALS
from infra.harness.simulation.clock import Clock, virtual_time
from infra.harness.simulation.model import Event, Model
from infra.harness.simulation.worker import (
    APP,
    CHANGELOG_TOPIC,
    DEAD,
    LIMITS,
    OUT,
    SOURCE,
    Machine,
    Worker,
    low_bits,
)
from streams.core.columns import Columns
from streams.core.deadlines import BUCKET_MS
from streams.core.policy import Reason
from streams.engine.delivery import RecordBatch
from streams.engine.ownership import OwnedPartition
from streams.storage.reader import read_users
from streams.wire.embeddings import Message
from streams.wire.partitioner import partitions_of

BEGIN_MS = 1_700_000_000_000
POISON = [
    b"{",
    b"\xff\xfe",
    b'{"user_id":"u0"}',
    b"[]",
    b'{"user_id":"u0","item_id":"i","action":"see","timestamp_ms":-5}',
]
SENDERS = (h.Act, h.Late, h.Duplicate, h.Tombstone, h.Poison, h.InTransaction, h.EndTransactions)
"""Steps of which the worker notices nothing before it polls."""
NEVER_MS = 10**9
"""Stands for "no bound"."""
TRANSACTIONAL = -1
"""Producer of transactions in the source topic."""
ZOMBIES_MAX = 2
GOING_BACK_S = 10.0
"""Time within which a worker gives its partitions back."""
RECOVERY_S = 6.0
"""Time within which a partition that failed is tried again."""


class Violation(AssertionError):
    """An invariant is violated."""


class Output(NamedTuple):
    """A record of the output topic; a tombstone has the version None."""

    user: bytes
    version: str | None
    offset: int
    items: tuple[int, ...]


def run_history(history: h.History, digest: Digest | None = None) -> list[str]:
    """Run a history to its end and return its event log; raise `Violation`.

    `digest` is updated after every step with plain values, so that renaming a class does not change it.
    """
    simulation = Simulation(history, digest=digest)
    with virtual_time(simulation.clock):
        try:
            simulation.begin()
            for step in history.steps:
                simulation.take(step)
            simulation.finish()
        finally:
            simulation.close()
    return simulation.event_log


class Digest(Protocol):
    """A hash object of `hashlib`."""

    def update(self, data: bytes, /) -> None:
        """Add data to the hash."""


@dataclass
class Simulation:
    """A broker, a worker, workers that were frozen, the model of each partition, and the clock."""

    history: h.History
    broker: Broker = field(default_factory=Broker)
    clock: Clock = field(default_factory=Clock)
    clock_offset_ms: int = 10_000
    """Lead of the worker's clock over the senders'; without it, the worker would cap the times of tombstones."""
    version: int = 1
    event_log: list[str] = field(default_factory=list)
    digest: Digest | None = None

    def __post_init__(self) -> None:
        partitions = self.history.partitions
        for topic in (SOURCE, CHANGELOG_TOPIC, OUT, DEAD):
            self.broker.create(topic, partitions)
        self.models = [Model(LIMITS.sequence_length) for _ in range(partitions)]
        self._events: list[dict[int, Event | None]] = [{} for _ in range(partitions)]
        """What was sent, by partition and offset."""
        self._sent: list[tuple[int, Record, Event | None]] = []
        self._partition_of = {
            user: int(partitions_of([user], partitions)[0]) for user in (b"u%d" % number for number in range(h.USERS))
        }
        self._zombies: list[Worker] = []
        self._foreign: set[int] = set()
        """Producers of workers that had lost their partitions."""
        self._repeats = False
        """True once an acknowledgement was lost, so that outputs may be repeated."""
        self._has_lost = False
        """True once a fetch was lost: nothing but a later record shows the gap."""
        self._checked_outputs = [0] * partitions
        self._newest: dict[tuple[bytes, str | None], int] = {}
        self._published: dict[bytes, int] = {}
        self._trusted_ms = 0
        self._violation: Violation | None = None
        self._steps: dict[type[h.Step], Callable[[Any], None]] = {
            h.Act: lambda s: self._send(s.user, 0, "buy" if s.strong else "see"),
            h.Late: lambda s: self._send(s.user, s.behind_ms, "see"),
            h.Duplicate: self._duplicate,
            h.Tombstone: self._tombstone,
            h.Poison: self._poison,
            h.InTransaction: lambda s: self._send(s.user, 0, "see", is_transactional=True),
            h.EndTransactions: lambda s: self._end_transactions(commit=s.commit),
            h.Poll: lambda s: self.worker.poll(s.records),
            h.LostFetch: self._lose_fetch,
            h.Redeliver: self._redeliver,
            h.Silence: lambda s: self._pass(s.ms),
            h.ClockJump: self._jump,
            h.Encode: lambda s: self.worker.thread.run(s.calls),
            h.EncoderFails: lambda s: setattr(self.worker.encoder, "failures", s.calls),
            h.BadUser: self._bad_user,
            h.Deliver: lambda s: self.worker.link.deliver(OUTPUT, s.outputs),
            h.Acknowledge: lambda _: self.worker.link.acknowledge(OUTPUT),
            h.Refuse: lambda s: self._fail(OUTPUT, s.kind),
            h.Checkpoint: lambda _: self.worker.checkpoint(),
            h.Commit: self._commit,
            h.FailCheckpoint: lambda s: self._fail(CHANGELOG, s.kind),
            h.DiskFull: self._disk_full,
            h.TornCheckpoint: self._torn_checkpoint,
            h.Crash: lambda s: self._restart(s.lost_writes),
            h.TornRestore: self._torn_restore,
            h.Rebalance: self._rebalance,
            h.Reassign: self._reassign,
            h.Wake: self._wake,
            h.Compaction: self._compact,
            h.NewRelease: self._new_release,
            h.ForeignSource: self._foreign_source,
            h.LostChangelog: self._lost_changelog,
        }

    @property
    def now_ms(self) -> int:
        """Time of the senders."""
        return BEGIN_MS + round(self.clock.now_s * 1_000)

    def begin(self) -> None:
        """Start the first worker."""
        self.machine = Machine()
        self._former: Machine | None = None
        self._start(self.machine)

    def take(self, step: h.Step) -> None:
        """Take one step, let the worker run, and check everything."""
        self._steps[type(step)](step)
        if isinstance(step, SENDERS):
            self.clock.now_s += 0.001
        else:
            self.worker.run_until(self.clock.now_s)
            self._check()
        outputs = [self._output(log) for log in self.broker.topics[OUT].logs]
        offsets = [owned.next_offset for _, owned in sorted(self.worker.partitions.ready.items())]
        self.event_log.append(f"{step} {self.now_ms} {offsets} {outputs}")
        if self.digest is not None:
            self.digest.update(f"{astuple(step)} {self.now_ms} {offsets} {outputs}\n".encode())

    def finish(self) -> None:
        """Process everything that is left; then every user must be covered, and a restore must yield the same state."""
        self._heal()
        policy = self.history.policy
        wait_ms = max(policy.max_staleness_ms, policy.session_gap_ms, policy.cooldown_ms, 1_000) + policy.spread_ms
        for _ in range(4):
            self.take(h.Poll(10**6))
            self.take(h.Checkpoint())
            self.take(h.Silence(wait_ms + 1_000))
        self._check_complete()
        self.take(h.Checkpoint())
        self.take(h.Crash())
        self.take(h.Rebalance(in_order=True, old_disk=False))
        self._check_rejected()

    def close(self) -> None:
        """End every worker."""
        for worker in (self.worker, *self._zombies):
            worker.die()
            worker.loop.close()

    def _heal(self) -> None:
        """End every fault; a worker that counts failures of users or has lost all its partitions starts again."""
        self._end_transactions(commit=True)
        for user in range(h.USERS if self._has_lost else 0):
            self._send(user, 0, "see")
        for zombie in list(self._zombies):
            self._wake(h.Wake())
            zombie.die()
        self._zombies.clear()
        worker = self.worker
        worker.encoder.failures = 0
        worker.encoder.bad_users.clear()
        for disk in worker.machine.disks.values():
            disk.failures = 0
        worker.hold(holds=False)
        if worker.metrics.unencodable.value():
            self._restart(lost_writes=0)
            self.worker.hold(holds=False)
        self._pass(round(RECOVERY_S * 1_000))

    # -- the sender

    def _send(self, user: int, behind_ms: int, action: str, *, is_transactional: bool = False) -> None:
        number = len(self._sent)
        name, item = f"u{user}", f"i{number}"
        body = {"user_id": name, "item_id": item, "action": action, "timestamp_ms": self.now_ms - behind_ms}
        event_id = f"e{number}" if number % 3 else ""
        value = json.dumps(body | ({"event_id": event_id} if event_id else {})).encode()
        event = Event(
            name.encode(),
            self.now_ms - behind_ms,
            low_bits(item_key(item)),
            item_key(event_id) if event_id else 0,
            strong=action == "buy",
        )
        self._log(self._partition_of[event.user], event.user, value, event, is_transactional=is_transactional)

    def _duplicate(self, step: h.Duplicate) -> None:
        if step.back <= len(self._sent):
            partition, record, event = self._sent[-step.back]
            self._log(partition, record.key, record.value, event)

    def _tombstone(self, step: h.Tombstone) -> None:
        user = b"u%d" % step.user
        self._log(self._partition_of[user], user, None, Event(user, self.now_ms, tombstone=True))

    def _poison(self, step: h.Poison) -> None:
        right = self._partition_of[b"u0"]
        if step.kind < len(POISON):
            self._log(right, b"u0", POISON[step.kind], None)
        elif self.history.partitions > 1:
            body = {"user_id": "u0", "item_id": "i", "action": "see", "timestamp_ms": self.now_ms}
            self._log(1 - right, b"u0", json.dumps(body).encode(), None)

    def _log(
        self,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        event: Event | None,
        *,
        is_transactional: bool = False,
    ) -> None:
        timestamp_ms = event.timestamp_ms if event is not None and event.tombstone else self.now_ms
        log = self.broker.topics[SOURCE].logs[partition]
        offset = log.append(
            [(key, value, [])], writer=TRANSACTIONAL, is_transactional=is_transactional, timestamp=timestamp_ms
        )
        self._events[partition][offset] = event
        self._sent.append((partition, (log.uncommitted if is_transactional else log.records)[offset], event))
        self._note_stable(partition)

    def _end_transactions(self, *, commit: bool) -> None:
        for partition, log in enumerate(self.broker.topics[SOURCE].logs):
            if not commit and log.open:
                for offset in log.uncommitted:
                    self._events[partition].pop(offset, None)
            log.end_transaction(TRANSACTIONAL, commit=commit)
            self._note_stable(partition)

    def _note_stable(self, partition: int) -> None:
        """Append what can be read by now to the model."""
        model, log, events = self.models[partition], self.broker.topics[SOURCE].logs[partition], self._events[partition]
        for offset in range(len(model.log), log.stable):
            if offset in events:
                model.append(events[offset])
            else:
                model.skip()

    # -- the worker

    def _start(self, machine: Machine, *, holds: bool = True, effects: int | None = None) -> None:
        self.machine = machine
        self._put_back_ms = dict[bytes, int]()
        """Processing time until which users wait who are in the queue or a job, or whose last attempt failed."""
        self.worker = Worker(
            self.broker,
            machine,
            self.history.policy,
            f"v{self.version}",
            clock=self.clock,
            now_ms=self._clock_ms,
            wait_ms=self.history.wait_ms,
            watch=self,
        )
        self.worker.link.on_acknowledged = self._note_acknowledged
        self.worker.link.effects_left = effects
        self._next = dict[int, int]()
        """Offset up to which the worker has applied each partition."""
        self._ready_ms = dict[int, int]()
        self._unencoded = dict[bytes, list[tuple[int, int, bool]]]()
        """Per user: offset, time of application and whether it was strong, of actions that no output contains."""
        self._handed_over_ms = dict[bytes, int]()
        """Processing time of each user's last hand-over, or of the acknowledgement after it."""
        self.worker.start(holds=holds)

    def _clock_ms(self) -> int:
        return self.now_ms + self.clock_offset_ms

    def _redeliver(self, step: h.Redeliver) -> None:
        owned = self.worker.partitions.ready.get(step.partition)
        if owned is not None:
            begin = max(0, owned.next_offset - step.records)
            log = self.broker.topics[SOURCE].logs[step.partition]
            records, end = log.read(begin, min(step.records + 1, LIMITS.hot_users_max))
            self.worker.redeliver(RecordBatch(owned.tp, begin, end, list(records), owned.epoch))

    def _lose_fetch(self, step: h.LostFetch) -> None:
        self.worker.poll(step.records, is_lost=True)
        self._has_lost = True

    def _pass(self, ms: int) -> None:
        self.worker.run_until(self.clock.now_s + ms / 1_000)

    def _jump(self, step: h.ClockJump) -> None:
        if step.ms < 0:  # older deadlines refer to the clock before it was set back, so they come later by the jump
            self._trusted_ms = max(self._trusted_ms, self._clock_ms())
            self._handed_over_ms.clear()
        self.clock_offset_ms = max(self.clock_offset_ms + step.ms, 0)
        self._pass(BUCKET_MS)  # the time within which the worker looks at its clock

    def _bad_user(self, step: h.BadUser) -> None:
        bad = self.worker.encoder.bad_users
        (bad.add if step.is_bad else bad.discard)(b"u%d" % step.user)

    def _fail(self, kind: str, refusal: int) -> None:
        error, is_applied = (MessageSizeTooLargeError, False) if refusal == len(REFUSALS) else REFUSALS[refusal]
        self.worker.link.fail(kind, error(), is_applied=is_applied)
        self._repeats |= self.worker.link.has_unknown

    def _commit(self, step: h.Commit) -> None:
        for _ in range(step.steps):
            if not self.worker.link.pending[CHANGELOG]:
                return
            self.worker.link.deliver(CHANGELOG, 1)
            self.worker.link.acknowledge(CHANGELOG)
            self.worker.loop.settle()

    def _disk_full(self, step: h.DiskFull) -> None:
        for disk in self.machine.disks.values():
            disk.failures = step.writes

    def _torn_checkpoint(self, step: h.TornCheckpoint) -> None:
        self.worker.link.effects_left = step.step
        self.worker.hold(holds=False)
        self.worker.checkpoint()
        self._restart(step.lost_writes)

    def _restart(self, lost_writes: int) -> None:
        self.worker.die()
        self.worker.loop.close()
        self.machine.crash(lost_writes)
        self._start(self.machine)

    def _torn_restore(self, step: h.TornRestore) -> None:
        self.worker.die()
        self.worker.loop.close()
        self.machine.crash(lost_writes=5)
        self._start(self.machine, effects=step.step)
        self._restart(lost_writes=0)

    def _rebalance(self, step: h.Rebalance) -> None:
        old = self.worker
        if step.in_order:
            self._give_back(old)
        former = self._former.copy() if step.old_disk and self._former is not None else Machine()
        self._former = self.machine.copy()
        self._freeze(old)
        self._start(former)

    def _give_back(self, worker: Worker) -> None:
        worker.hold(holds=False)
        worker.spawn(worker.partitions.revoke_all())
        self._pass(round(GOING_BACK_S * 1_000))
        if worker.partitions.ready:
            raise Violation("a worker did not give its partitions back")

    def _freeze(self, worker: Worker) -> None:
        worker.app.consumer._thread._consumer.is_member = False
        worker.unwatch()
        worker.link.on_acknowledged = lambda topic, messages: None
        self._zombies.append(worker)
        self._foreign |= worker.link.producers
        if len(self._zombies) > ZOMBIES_MAX:
            gone = self._zombies.pop(0)
            gone.die()
            gone.loop.close()

    def _wake(self, _: h.Wake) -> None:
        """Let a frozen worker run: it may send outputs that it had in flight, and nothing else."""
        if not self._zombies:
            return
        zombie = self._zombies[0]
        before = self._owned_by_group()
        zombie.hold(holds=False)
        zombie.run_until(self.clock.now_s)
        zombie.checkpoint()
        zombie.run_until(self.clock.now_s)
        self._foreign |= zombie.link.producers
        if before != self._owned_by_group():
            raise Violation("a worker wrote to a partition that it had lost")

    def _owned_by_group(self) -> Any:
        return dict(self.broker.committed), [dict(log.records) for log in self.broker.topics[CHANGELOG_TOPIC].logs]

    def _reassign(self, step: h.Reassign) -> None:
        mine, machine = self.worker, self.machine
        self._give_back(mine)
        if step.records:
            self._start(Machine(), holds=False)
            self.worker.poll(step.records)
            self.worker.run_until(self.clock.now_s)
            self._check()
            self._give_back(self.worker)
            self.worker.die()
            self.worker.loop.close()
        self._take_again(mine, machine)

    def _take_again(self, worker: Worker, machine: Machine) -> None:
        self.worker, self.machine = worker, machine
        self._next.clear()
        self._unencoded.clear()
        self._handed_over_ms.clear()
        worker.assign()
        worker.hold(holds=True)

    def _compact(self, step: h.Compaction) -> None:
        for log in self.broker.topics[CHANGELOG_TOPIC].logs:
            log.compact(drop_tombstones=step.drop_tombstones)

    def _new_release(self, _: h.NewRelease) -> None:
        self.version += 1
        self._restart(lost_writes=0)

    def _foreign_source(self, _: h.ForeignSource) -> None:
        """Start a worker on another source topic: it must end itself, with everything as it was."""
        if len(self.broker.committed) < self.history.partitions:
            return  # without a checkpoint there is no state that could be of another log
        own = self.broker.topics[SOURCE]
        self.worker.die()
        self.worker.loop.close()
        other = self.broker.create(SOURCE, self.history.partitions)
        for partition, log in enumerate(own.logs):
            other.logs[partition] = Log(dict(log.records), end=log.end + 3)
        before = self._owned_by_group(), [log.end for log in self.broker.topics[OUT].logs]
        self._start(self.machine, holds=False)
        self.worker.run_until(self.clock.now_s)
        if self.worker.partitions.ready or "is of another log" not in (self.worker.aborted or ""):
            raise Violation("a worker goes on although its source topic was created again")
        if before != (self._owned_by_group(), [log.end for log in self.broker.topics[OUT].logs]):
            raise Violation("a worker that must not go on has written something")
        self.broker.topics[SOURCE] = own
        self._restart(lost_writes=0)

    def _lost_changelog(self, _: h.LostChangelog) -> None:
        self.worker.die()
        self.worker.loop.close()
        self.broker.create(CHANGELOG_TOPIC, self.history.partitions)
        self.broker.committed.clear()
        self._former = None
        for zombie in self._zombies:
            zombie.die()
            zombie.loop.close()
        self._zombies.clear()
        self._start(self.machine)

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
        if topic == OUT:
            users = [key for key, value, _ in messages if key is not None and value is not None]
            self._handed_over_ms |= dict.fromkeys(users, self._clock_ms())

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
            elif offset > self._published.get(event.user, -1):
                self._unencoded.setdefault(event.user, []).append((offset, self._clock_ms(), event.strong))
        self._next[partition] = owned.next_offset

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
        if record.writer not in self._foreign:
            newest = max(self._newest.get((output.user, v), -1) for v in (None, output.version or f"v{self.version}"))
            if output.offset < newest or (output.offset == newest and not self._repeats):
                raise Violation(f"{output} follows an output of offset {newest}")
            self._newest[output.user, output.version] = output.offset
        self._published[output.user] = max(output.offset, self._published.get(output.user, -1))
        waiting = self._unencoded.get(output.user)
        if waiting:
            self._unencoded[output.user] = [each for each in waiting if each[0] > output.offset]

    def _check_content(self, model: Model, output: Output) -> None:
        right = model.at(output.user, output.offset + 1)
        is_tombstone = output.version is None
        if (output.offset, output.items, is_tombstone) != (right.changed_at, right.items, not right.items):
            raise Violation(f"{output} differs from the expected {right}")

    def _check_freshness(self, owned: OwnedPartition) -> None:
        worker, policy, state = self.worker, self.history.policy, owned.state._sequences
        wait_ms = 0 if policy.every_n == 1 else policy.max_staleness_ms or NEVER_MS
        for user, waiting in self._unencoded.items():
            if not waiting or self._partition_of[user] != owned.tp.partition:
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
                last = self._published.get(user, -1)
                if last != right.changed_at:
                    raise Violation(f"the last output of {user!r} has offset {last}, expected {right.changed_at}")

    def _check_rejected(self) -> None:
        for partition, (model, log) in enumerate(zip(self.models, self.broker.topics[DEAD].logs, strict=True)):
            headers = [dict(record.headers) for record in log.records.values()]
            rejected = {int(each["source-offset"]) for each in headers if each["error-reason"] != b"encoder-failed"}
            if rejected != model.malformed:
                raise Violation(
                    f"partition {partition}: rejected {sorted(rejected)}, malformed {sorted(model.malformed)}"
                )

    @staticmethod
    def _output(log: Log) -> Any:
        return tuple(output_of(log.records[log.end - 1])) if log.end else None


def output_of(record: Record) -> Output:
    """Return the content of a record of the output topic."""
    headers = dict(record.headers)
    offset = int(headers["source-offset"])
    assert record.key is not None
    if record.value is None:
        return Output(record.key, None, offset, ())
    items = tuple(int(item) for item in np.frombuffer(record.value, "<f4").tolist() if item >= 0)
    return Output(record.key, headers["encoder-version"].decode(), offset, items)
