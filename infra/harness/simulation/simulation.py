"""Run one history against the real code with an independent model beside it, and check both after every step.

The checks, by invariant of the design:

1. (parity) an embedding's items are those of the model at the source offset that the embedding states;
2. and 3. (exactly once, order) every user's sequence, in memory or in the store, equals the model's; a restore from the
   changelog yields the model's sequence at the committed offset;
4. (freshness) a user with an unencoded action never waits longer than its policy allows, and in the end every user is
   covered by an output;
5. (monotone) per user and version, source offsets in the output topic increase strictly;
6. (no poison) exactly the malformed records are rejected;
7. (bounded) there are never more users in memory than the limit, and a strong action moves its user up in the queue.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from typing import Protocol

from encoder.actions.columns import Actions, item_key
from encoder.arrays import I64
from infra.harness.simulation import history as h
from infra.harness.simulation.broker import Broker, Fenced, Output, SourceRecord
from infra.harness.simulation.model import Event, Model
from infra.harness.simulation.worker import LIMITS, Died, Disk, Violation, Worker
from streams.core.columns import Columns
from streams.core.deadlines import BUCKET_MS
from streams.core.policy import Reason
from streams.storage.reader import read_users

BEGIN_MS = 1_700_000_000_000
POISON = [
    b"{",
    b"\xff\xfe",
    b'{"user_id":"u0"}',
    b"[]",
    b'{"user_id":"u0","item_id":"i","action":"see","timestamp_ms":-5}',
]
SENDERS = (h.Act, h.Late, h.Duplicate, h.Tombstone, h.Poison)
RESTARTS = (h.TornCheckpoint, h.Crash, h.TornRestore, h.Rebalance, h.NewRelease)
"""After these steps the worker has just started, and its timers have not fired yet."""
NEVER_MS = 10**9
"""Stands for "no bound"."""


def run_history(history: h.History, digest: Digest | None = None) -> list[str]:
    """Run a history to its end and return its event log; raise `Violation`.

    `digest` is updated after every step with plain values, so that renaming a class does not change it.
    """
    simulation = Simulation(history, digest=digest)
    for step in history.steps:
        simulation.take(step)
    simulation.finish()
    return simulation.event_log


class Digest(Protocol):
    """A hash object of `hashlib`."""

    def update(self, data: bytes, /) -> None:
        """Add data to the hash."""


class CrashAt:
    """Lets `left` side effects happen, then raises `Died`; never raises while `left` is None."""

    def __init__(self) -> None:
        self.left: int | None = None

    def __call__(self, name: str) -> None:
        """Count one side effect."""
        if self.left is not None:
            if not self.left:
                raise Died(name)
            self.left -= 1


@dataclass
class Simulation:
    """A broker, a worker, the model and the clock."""

    history: h.History
    broker: Broker = field(default_factory=Broker)
    model: Model = field(default_factory=lambda: Model(LIMITS.sequence_length))
    now_ms: int = BEGIN_MS
    clock_offset_ms: int = 10_000
    """Lead of the worker's clock over the senders'; without it, the worker would cap the times of tombstones."""
    version: int = 1
    event_log: list[str] = field(default_factory=list)
    digest: Digest | None = None

    def __post_init__(self) -> None:
        self.crash_at = CrashAt()
        self._rejected: set[int] = set()
        self._checked_outputs = 0
        self._trusted_ms = 0
        self._newest: dict[tuple[bytes, int | None], int] = {}
        self._steps: dict[type[h.Step], Callable[..., None]] = {
            h.Act: lambda s: self._send(s.user, 0, "buy" if s.strong else "see"),
            h.Late: lambda s: self._send(s.user, s.behind_ms, "see"),
            h.Duplicate: self._duplicate,
            h.Tombstone: self._tombstone,
            h.Poison: self._poison,
            h.Poll: lambda s: self._alive(lambda: self.worker.poll(s.records)),
            h.Redeliver: lambda s: self._alive(lambda: self._redeliver(s.records)),
            h.Silence: lambda s: self._pass(s.ms),
            h.ClockJump: self._jump,
            h.Encode: lambda s: self.worker.encode(s.users),
            h.Publish: lambda _: self.worker.publish(),
            h.Deliver: lambda s: self.worker.deliver(s.outputs),
            h.Acknowledge: lambda _: self._alive(self.worker.acknowledge),
            h.Shed: lambda s: self._alive(lambda: self.worker.shed(s.delay_ms)),
            h.Checkpoint: lambda _: self._alive(self.worker.checkpoint),
            h.TornCheckpoint: self._torn_checkpoint,
            h.Crash: lambda s: self._restart(s.lost_writes),
            h.TornRestore: self._torn_restore,
            h.Rebalance: self._rebalance,
            h.Compaction: lambda _: self.broker.compact(),
            h.NewRelease: self._new_release,
        }
        self.worker = self._new_worker(Disk())
        self.worker.start()

    def take(self, step: h.Step) -> None:
        """Take one step, fire due timers, and check everything."""
        self._steps[type(step)](step)
        if not isinstance(step, RESTARTS):
            self._alive(self.worker.fire_timers)
        self._check(sequences=not isinstance(step, SENDERS))
        self.event_log.append(f"{step} {self.now_ms} {self.worker.next_offset} {self.broker.outputs[-1:]}")
        if self.digest is not None:
            last = [astuple(output) for output in self.broker.outputs[-1:]]
            self.digest.update(f"{astuple(step)} {self.now_ms} {self.worker.next_offset} {last}\n".encode())

    def finish(self) -> None:
        """Process everything that is left; then every user must be covered, and a restore must yield the same state."""
        self.take(h.Poll(10**6))
        policy = self.history.policy
        for _ in range(4):
            self.take(h.Silence(max(policy.max_staleness_ms, policy.session_gap_ms, policy.cooldown_ms, 5_000) + 1_000))
            self.worker.drain()
        self._check(sequences=True)
        for user in self.model.past:
            self._check_covered(user)
        self.take(h.Checkpoint())
        self.take(h.Crash())
        self.take(h.Rebalance(checkpointed=True, keeps_disk=False))
        malformed = {offset for offset, event in enumerate(self.model.log) if event is None}
        if self._rejected != malformed:
            raise Violation(f"rejected are {sorted(self._rejected)}, malformed are {sorted(malformed)}")

    # -- the sender

    def _send(self, user: int, behind_ms: int, action: str) -> None:
        offset = len(self.model.log)
        name, item = f"u{user}", f"i{offset}"
        body = {"user_id": name, "item_id": item, "action": action, "timestamp_ms": self.now_ms - behind_ms}
        event_id = f"e{offset}" if offset % 3 else ""
        value = json.dumps(body | ({"event_id": event_id} if event_id else {})).encode()
        event = Event(
            name.encode(),
            self.now_ms - behind_ms,
            item_key(item),
            item_key(event_id) if event_id else 0,
            strong=action == "buy",
        )
        self._log(name.encode(), value, event)
        self.now_ms += 1

    def _duplicate(self, step: h.Duplicate) -> None:
        back = len(self.broker.source) - step.back
        if back >= 0:
            record = self.broker.source[back]
            self._log(record.key, record.value, self.model.log[back])

    def _tombstone(self, step: h.Tombstone) -> None:
        user = f"u{step.user}".encode()
        self._log(user, None, Event(user, self.now_ms, tombstone=True))

    def _poison(self, step: h.Poison) -> None:
        self._log(b"u0", POISON[step.kind], None)

    def _log(self, key: bytes | None, value: bytes | None, event: Event | None) -> None:
        timestamp_ms = event.timestamp_ms if event is not None and event.tombstone else self.now_ms
        self.broker.source.append(SourceRecord(key, value, len(self.broker.source), timestamp_ms))
        self.model.append(event)

    # -- the worker

    def _new_worker(self, disk: Disk) -> Worker:
        worker = Worker(
            self.broker, disk, self.history.policy, self.version, self._clock_ms(), self.crash_at, self._note_applied
        )
        worker.rejected = self._rejected
        return worker

    def _clock_ms(self) -> int:
        return self.now_ms + self.clock_offset_ms

    def _alive(self, act: Callable[[], None]) -> None:
        """Call a method of the worker after setting its clock."""
        self.worker.now_ms = self._clock_ms()
        act()

    def _redeliver(self, records: int) -> None:
        end = self.worker.next_offset
        begin = max(0, end - min(records, LIMITS.hot_users_max))
        self.worker.process(begin, end)

    def _note_applied(self, begin: int, end: int) -> None:
        """Record since when users wait for an embedding, for the check of freshness."""
        for offset, event in enumerate(self.model.log[begin:end], begin):
            if event is None or self.model.at(event.user, offset + 1).changed_at != offset:
                continue
            if event.tombstone:
                self.worker.unencoded_since_ms.pop(event.user, None)
                self.worker.strong_users.discard(event.user)
            elif offset > max((o.offset for o in self.broker.outputs if o.user == event.user), default=-1):
                self.worker.unencoded_since_ms.setdefault(event.user, self.worker.now_ms)
                if event.strong and self.history.policy.strong:
                    self.worker.strong_users.add(event.user)

    def _pass(self, ms: int) -> None:
        """Let time pass in steps of one bucket, so that deadlines fire on time."""
        until_ms = self.now_ms + ms
        while self.now_ms < until_ms:
            self.now_ms = min(self.now_ms + BUCKET_MS, until_ms)
            self._alive(self.worker.fire_timers)

    def _jump(self, step: h.ClockJump) -> None:
        if step.ms < 0:  # older deadlines refer to the clock before it was set back, so they come later by the jump
            self._trusted_ms = max(self._trusted_ms, self._clock_ms())
            self.worker.handed_over_ms.clear()
        self.clock_offset_ms = max(self.clock_offset_ms + step.ms, 0)

    def _torn_checkpoint(self, step: h.TornCheckpoint) -> None:
        self.crash_at.left = step.step
        with suppress(Died):
            self._alive(self.worker.checkpoint)
        self.crash_at.left = None
        self._restart(step.lost_writes)

    def _restart(self, lost_writes: int) -> None:
        disk = self.worker.disk
        disk.crash(lost_writes)
        self.worker = self._new_worker(disk)
        self.worker.start()
        self._check_restored()

    def _torn_restore(self, step: h.TornRestore) -> None:
        disk = self.worker.disk
        disk.crash(lost_writes=5)
        self.crash_at.left = step.step
        with suppress(Died):
            self._new_worker(disk).start()
        self.crash_at.left = None
        self._restart(lost_writes=0)

    def _rebalance(self, step: h.Rebalance) -> None:
        old = self.worker
        if step.checkpointed:
            self._alive(old.checkpoint)
        self.worker = self._new_worker(old.disk if step.keeps_disk else Disk())
        self.worker.start()
        self._check_restored()
        old.in_flight.clear()  # outputs in flight are lost; a subscriber ignores those that arrive too late
        before = (self.broker.committed_offset, dict(self.broker.changelog))
        with suppress(Fenced):
            old.checkpoint()
        if before != (self.broker.committed_offset, self.broker.changelog):
            raise Violation("a worker wrote to a partition that it had lost")

    def _new_release(self, _: h.NewRelease) -> None:
        self.version += 1
        self._restart(lost_writes=0)

    # -- the checks

    def _check(self, *, sequences: bool) -> None:
        self._check_outputs()
        self._check_freshness()
        self._check_promoted()
        if self.worker.state.hot_users > LIMITS.hot_users_max:
            raise Violation(f"{self.worker.state.hot_users} users in memory")
        if sequences:
            self._compare(self.worker.next_offset)

    def _compare(self, offset: int) -> None:
        """Compare every sequence, in memory or in the store, with the model's after all records before `offset`."""
        state = self.worker.state._sequences
        hot = [user for user in self.model.past if user in state.row_of]
        actions, starts = state.kept(state.rows_of(hot))
        self._compare_all(hot, state.headers[state.rows_of(hot)], actions, starts, offset)
        cold = [user for user in self.model.past if user not in state.row_of]
        stored = read_users(self.worker.disk, cold, LIMITS).stored
        self._compare_all(cold, stored.headers, stored.actions, stored.starts, offset)

    def _compare_all(self, users: list[bytes], headers: Columns, actions: Actions, starts: I64, offset: int) -> None:
        items = actions["item"].tolist()
        for row, user in enumerate(users):
            right = self.model.at(user, offset)
            kept = tuple(items[starts[row] : starts[row + 1]])
            if (kept, headers["count"][row], headers["applied_offset"][row]) != (
                right.items,
                right.count,
                right.changed_at,
            ):
                raise Violation(f"{user!r} has {kept} and header {headers[row]}, expected {right}")

    def _check_restored(self) -> None:
        """Check a worker that has just started, whose only state is the restored one."""
        if self.worker.state.hot_users:
            raise Violation("a worker started with users in memory")
        self._compare(self.broker.committed_offset or 0)

    def _check_outputs(self) -> None:
        for output in self.broker.outputs[self._checked_outputs :]:
            newest = max(self._newest.get((output.user, v), -1) for v in (None, output.version or self.version))
            if output.offset <= newest:
                raise Violation(f"{output} follows an output of offset {newest}")
            self._newest[output.user, output.version] = output.offset
            self._check_content(output)
        self._checked_outputs = len(self.broker.outputs)

    def _check_content(self, output: Output) -> None:
        right = self.model.at(output.user, output.offset + 1)
        is_tombstone = output.version is None
        if (output.offset, output.items, is_tombstone) != (right.changed_at, right.items, not right.items):
            raise Violation(f"{output} differs from the expected {right}")

    def _check_freshness(self) -> None:
        worker, policy = self.worker, self.history.policy
        wait_ms = 0 if policy.every_n == 1 else policy.max_staleness_ms or NEVER_MS
        in_job = {user for job in worker.jobs for user in job.sequences.users}
        in_job |= {user for sent in worker.in_flight if sent.job is not None for user in sent.job.sequences.users}
        for user, since_ms in worker.unencoded_since_ms.items():
            if user in worker.queue or user in in_job or user in worker.shed_users:
                continue
            # A cooldown may have begun under an earlier worker, and a deadline on a clock that has been set back since.
            from_ms = max(worker.started_ms, self._trusted_ms)
            cooled_ms = worker.handed_over_ms.get(user, from_ms) + policy.cooldown_ms
            bound_ms = max(since_ms + wait_ms, self._trusted_ms + wait_ms, cooled_ms) + 2 * BUCKET_MS
            if worker.now_ms > bound_ms:
                raise Violation(
                    f"{user!r} has waited since {since_ms}; the bound was {bound_ms}, now it is {worker.now_ms}"
                )

    def _check_promoted(self) -> None:
        """A user that waits in the queue and has made a strong action waits at least at the priority of that reason."""
        priorities = self.history.policy.priorities
        strong = len(priorities) - priorities.index(Reason.STRONG)
        for user in self.worker.strong_users & self.worker.queue.keys():
            if self.worker.queue[user] < strong:
                raise Violation(f"{user!r} waits at priority {self.worker.queue[user]} and has made a strong action")

    def _check_covered(self, user: bytes) -> None:
        last = max((o.offset for o in self.broker.outputs if o.user == user), default=-1)
        right = self.model.at(user, len(self.model.log))
        if last != right.changed_at:
            raise Violation(f"the last output of {user!r} has offset {last}, expected {right.changed_at}")
