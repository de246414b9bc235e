"""One history: a broker, a worker made of the product's parts, zombies, the model and the clock; and the checks.

Steps that reach the worker let it run until nothing more can happen at this time. Its outputs, the steps of its
checkpoints and its encoder wait until a step lets them through, so everything else can happen in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Any, Protocol

from aiokafka.errors import MessageSizeTooLargeError

from infra.harness.simulation import history as h
from infra.harness.simulation.broker import Broker, Log, Record
from infra.harness.simulation.checks import Checks, Violation, output_of
from infra.harness.simulation.clients import REFUSALS
from infra.harness.simulation.clock import Clock, virtual_time
from infra.harness.simulation.features import FeatureOutput, features_of
from infra.harness.simulation.link import CHANGELOG, OUTPUT
from infra.harness.simulation.machine import LIMITS, Machine
from infra.harness.simulation.model import Event, Model
from infra.harness.simulation.sender import Sender
from infra.harness.simulation.worker import CHANGELOG_TOPIC, DEAD, FEATURES, OUT, SOURCE, Worker
from streams.core.deadlines import BUCKET_MS
from streams.engine.delivery import RecordBatch
from streams.wire.partitioner import partitions_of

SENDERS = (h.Act, h.Late, h.Duplicate, h.Tombstone, h.Poison, h.InTransaction, h.EndTransactions)
"""Steps of which the worker notices nothing before it polls."""
ZOMBIES_MAX = 2
GOING_BACK_S = 10.0
"""Time within which a worker gives its partitions back."""
RECOVERY_S = 6.0
"""Time within which a partition that failed is tried again."""


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
class Simulation(Checks, Sender):
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
        for topic in (SOURCE, CHANGELOG_TOPIC, OUT, FEATURES, DEAD):
            self.broker.create(topic, partitions)
        self.models = [
            Model(LIMITS.sequence_length, self.history.features, self.history.user_ttl_ms) for _ in range(partitions)
        ]
        self._clock_max_ms = 0
        """Latest time that any worker has seen."""
        self.broker.on_produced = self._on_produced
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
        self._checked_features = [0] * partitions
        self._newest_features: dict[bytes, tuple[int, int]] = {}
        """Source offset and time of each user's newest features."""
        self._last_features: dict[bytes, FeatureOutput] = {}
        self._published_features: dict[bytes, int] = {}
        """Greatest source offset of each user's features, by frozen workers too."""
        self._tombstones: dict[tuple[str, bytes], int] = {}
        """Source offset of the last tombstone by topic and user."""
        self._newest: dict[tuple[bytes, str | None], int] = {}
        self._published: dict[bytes, int] = {}
        self._trusted_ms = 0
        self._clock_went_back = False
        self._violation: Violation | None = None
        self._steps: dict[type[h.Step], Callable[[Any], None]] = {
            h.Act: lambda s: self._send(s.user, 0, "buy" if s.strong else "see"),
            h.Late: lambda s: self._send(s.user, s.behind_ms, "see"),
            h.Duplicate: self._duplicate,
            h.Tombstone: self._tombstone,
            h.Poison: self._poison,
            h.InTransaction: lambda s: self._send(s.user, 0, "see", is_transactional=not self.history.user_ttl_ms),
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
        features = [features_of(log.records[log.end - 1]) for log in self.broker.topics[FEATURES].logs if log.end]
        offsets = [owned.next_offset for _, owned in sorted(self.worker.partitions.ready.items())]
        seen = [(each.user, each.offset, each.as_of_ms, each.values) for each in features]
        self.event_log.append(f"{step} {self.now_ms} {offsets} {outputs} {seen}")
        if self.digest is not None:
            self.digest.update(f"{astuple(step)} {self.now_ms} {offsets} {outputs} {seen}\n".encode())

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

    # -- the worker

    def _start(self, machine: Machine, *, holds: bool = True, effects: int | None = None) -> None:
        self.machine = machine
        self._put_back_ms = dict[bytes, int]()
        """Processing time until which users wait who are in the queue or a job, or whose last attempt failed."""
        self.worker = Worker(
            self.broker,
            machine,
            self.history,
            f"v{self.version}",
            clock=self.clock,
            now_ms=self._clock_ms,
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
        self._acknowledged_features = dict[bytes, int]()
        """Source offset of the newest features of each user that this worker knows to be published."""
        self.worker.start(holds=holds)

    def _clock_ms(self) -> int:
        now_ms = self.now_ms + self.clock_offset_ms
        self._clock_max_ms = max(self._clock_max_ms, now_ms)
        return now_ms

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
        self._clock_went_back |= step.ms < 0
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
        for disk in self.machine.disks.values():
            disk.failures = 0  # otherwise the worker may halt before it compares anything
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

    @staticmethod
    def _output(log: Log) -> Any:
        return tuple(output_of(log.records[log.end - 1])) if log.end else None
