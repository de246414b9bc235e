"""A worker without Kafka, Faust or torch: the real decoding, state, codec, checkpoint and reader, kept in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from infra.harness.simulation.broker import Broker, Fenced, Output, Transaction
from streams.core.effects import Effects
from streams.core.jobs import EncodeJob
from streams.core.layout import StateLimits
from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.storage.checkpoint import checkpoint
from streams.storage.codec import CheckpointMark
from streams.storage.memory_store import MemoryStore
from streams.storage.reader import read_users
from streams.storage.store import Record
from streams.wire.actions import DecodeLimits, decode_actions

LIMITS = StateLimits(sequence_length=8, chunk_length=2, hot_users_max=4, wake_users_max=3)
DECODE = DecodeLimits(timestamp_ahead_max_ms=10**9)
RECORDS_PER_RESTORE_WRITE = 3


class Violation(AssertionError):
    """An invariant is violated."""


class Died(Exception):
    """The worker has died."""


class Disk(MemoryStore):
    """A store that keeps its contents after each write, so that a crash can undo the last writes."""

    def __init__(self) -> None:
        super().__init__(records_per_write=2)
        self.effect: Callable[[str], None] = lambda _: None
        self._past: deque[dict[bytes, bytes]] = deque([{}], maxlen=6)

    def write_steps(self, records: Sequence[Record], changelog_offset: int) -> Iterator[None]:
        """Write one batch per step, with a side effect before each."""
        steps = super().write_steps(records, changelog_offset)
        while True:
            self.effect("store")
            if next(steps, steps) is steps:
                return
            self._past.append(dict(self.records))
            yield

    def crash(self, lost_writes: int) -> None:
        """Undo the last writes, as far back as they are kept."""
        for _ in range(min(lost_writes, len(self._past) - 1)):
            self._past.pop()
        self.records = dict(self._past[-1])


@dataclass
class InFlight:
    """Outputs in flight to the broker."""

    outputs: list[Output]
    job: EncodeJob | None
    delivered: bool = False


@dataclass
class Worker:
    """A worker that owns the partition, from one start to one crash; public attributes are for the checks."""

    broker: Broker
    disk: Disk
    policy: TriggerPolicy
    version: int
    now_ms: int
    effect: Callable[[str], None]
    """Called right before each side effect; may raise."""
    on_applied: Callable[[int, int], None]
    """Called with each range of offsets that this worker has applied for the first time."""
    rejected: set[int] = field(default_factory=set)
    """Source offsets of rejected records."""
    queue: dict[bytes, int] = field(default_factory=dict)
    """Priority of each user in the encode queue."""
    jobs: deque[EncodeJob] = field(default_factory=deque)
    in_flight: deque[InFlight] = field(default_factory=deque)
    handed_over_ms: dict[bytes, int] = field(default_factory=dict)
    """Processing time of each user's last hand-over, or of the acknowledgement after it."""
    unencoded_since_ms: dict[bytes, int] = field(default_factory=dict)
    """Processing time of each user's oldest action that this worker applied and no job contains."""
    shed_users: set[bytes] = field(default_factory=set)
    strong_users: set[bytes] = field(default_factory=set)
    """Users with a strong action that this worker applied and no job contains."""

    def start(self) -> None:
        """Fence predecessors, restore, prove the restore complete, and seed the state."""
        self.started_ms = self.now_ms
        self.epoch = self.broker.fence()
        self.disk.effect = self.effect
        self._restore()
        mark = self.disk.mark()
        committed = self.broker.committed_offset
        if (mark.source_offset if mark else None) != committed:
            raise Violation(f"the restored mark is {mark}, but offset {committed} is committed")
        self.next_offset = mark.source_offset if mark else 0
        self.state = PartitionState(self.policy, LIMITS)
        outputs = self.broker.outputs[mark.output_offset if mark else 0 :]
        self.output_offset = len(self.broker.outputs)
        published = [output for output in outputs if output.version in (None, self.version)]
        self.state.seed_published([o.user for o in published], np.array([o.offset for o in published], np.int64))
        self.state.seed_deadlines(self.disk.pending())

    def _restore(self) -> None:
        local = self.disk.changelog_offset
        records = [(o, r) for o, r in sorted(self.broker.changelog.items()) if local is None or o > local]
        for begin in range(0, len(records), RECORDS_PER_RESTORE_WRITE):
            chunk = records[begin : begin + RECORDS_PER_RESTORE_WRITE]
            self.disk.write([record for _, record in chunk], chunk[-1][0])

    # -- events

    def poll(self, records: int) -> None:
        """Apply the next records, in batches whose users fit into memory."""
        end = min(self.next_offset + records, len(self.broker.source))
        while self.next_offset < end:
            cut = min(end, self.next_offset + LIMITS.hot_users_max)
            self.process(self.next_offset, cut)
            self.on_applied(self.next_offset, cut)
            self.next_offset = cut

    def process(self, begin: int, end: int) -> None:
        """Apply the records [begin, end) as one batch."""
        records = self.broker.source[begin:end]
        decoded = decode_actions(records, now_ms=self.now_ms, limits=DECODE)
        self.rejected |= {records[each.index].offset for each in decoded.rejected}
        if len(decoded.actions):
            self.load(decoded.actions.users)
            self._perform(self.state.apply(decoded.actions, self.now_ms))

    def load(self, users: Sequence[bytes]) -> None:
        """Load users into memory; when it is full, checkpoint first, and then drain the encoder."""
        for attempt in range(3):
            if attempt:
                self._checkpoint_for_room() if attempt == 1 else self.drain()
            cold = self.state.missing(users)
            self.state.evict(len(cold), spare=users)
            if len(cold) <= self.state.room:
                break
        read = read_users(self.disk, cold, LIMITS)
        if read.corrupt:
            raise Violation(f"corrupt after restore: {read.corrupt}")
        self.state.load(cold, read.stored)

    def _checkpoint_for_room(self) -> None:
        try:
            self.checkpoint()
        except Fenced as error:
            raise Died from error

    def fire_timers(self) -> None:
        """Fire all timers that are due."""
        for _ in range(100):
            due_ms = self.state.next_deadline_ms
            if due_ms is None or due_ms > self.now_ms:
                return
            effects = self.state.fire_timers(self.now_ms)
            self._perform(effects)
            for user in effects.to_load:
                self.load([user])
        raise Violation("firing timers does not come to an end")

    def _perform(self, effects: Effects) -> None:
        for user, priority in zip(effects.due, effects.priorities.tolist(), strict=True):
            if user in self.queue:  # a promotion: no new hand-over, so no cooldown applies
                self.queue[user] = max(priority, self.queue[user])
                continue
            if self.now_ms < self.handed_over_ms.get(user, -(10**9)) + self.policy.cooldown_ms:
                raise Violation(f"{user!r} was handed over within its cooldown")
            self.queue[user] = priority
            self.shed_users.discard(user)
            self.handed_over_ms[user] = self.now_ms
        if effects.forgotten:
            pairs = zip(effects.forgotten, effects.forgotten_offsets.tolist(), strict=True)
            self.in_flight.append(InFlight([Output(user, None, offset) for user, offset in pairs], None))

    # -- encoding

    def encode(self, users: int) -> None:
        """Begin a job for the users of the highest priority."""
        taken = sorted(self.queue, key=lambda user: -self.queue[user])[:users]
        for user in taken:
            del self.queue[user]
        job = self.state.begin_job(taken)
        for user in job.sequences.users:
            self.unencoded_since_ms.pop(user, None)
            self.strong_users.discard(user)
        if len(job):
            self.jobs.append(job)

    def publish(self) -> None:
        """Hand the oldest encoded job to the producer, without outdated users."""
        if not self.jobs:
            return
        job = self.jobs.popleft()
        job = job.select(self.state.drop_outdated(job))
        starts, items = job.sequences.starts.tolist(), job.sequences.actions["item"].tolist()
        outputs = [
            Output(user, self.version, int(job.offsets[row]), tuple(items[starts[row] : starts[row + 1]]))
            for row, user in enumerate(job.sequences.users)
        ]
        self.in_flight.append(InFlight(outputs, job))

    def deliver(self, outputs: int) -> None:
        """Let the broker receive the oldest outputs in flight, in order."""
        for sent in [each for each in self.in_flight if not each.delivered][:outputs]:
            self.broker.outputs += sent.outputs
            sent.delivered = True

    def acknowledge(self) -> None:
        """Process the acknowledgements of outputs that the broker has received."""
        while self.in_flight and self.in_flight[0].delivered:
            sent = self.in_flight.popleft()
            self.output_offset += len(sent.outputs)
            if sent.job is not None:
                users = sent.job.sequences.users
                self.state.finish_job(users, sent.job.offsets, self.now_ms)
                self.handed_over_ms |= dict.fromkeys(users, self.now_ms)

    def shed(self, delay_ms: int) -> None:
        """Shed the queued user of the lowest priority."""
        if self.queue:
            user = min(self.queue, key=lambda user: self.queue[user])
            del self.queue[user]
            self.handed_over_ms.pop(user, None)
            self.shed_users.add(user)
            self.state.requeue([user], self.now_ms, delay_ms)

    def drain(self) -> None:
        """Encode and publish everything in the queue."""
        while self.queue or self.jobs or self.in_flight:
            self.encode(100)
            self.publish()
            self.deliver(100)
            self.acknowledge()
        self._checkpoint_for_room()

    # -- checkpoints

    def checkpoint(self) -> None:
        """Run the real checkpoint; raise `Fenced`, or what `effect` raises."""
        mark = CheckpointMark(self.next_offset, self.output_offset)
        transaction = Transaction(self.broker, self.epoch, self.effect)
        run(checkpoint(self.state, mark, self, transaction, self.disk))

    async def acknowledged(self) -> None:
        """Let all outputs reach the broker; implements `streams.storage.checkpoint.Outputs`."""
        self.effect("outputs")
        self.deliver(len(self.in_flight))


def run(steps: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine that awaits nothing external."""
    try:
        while True:
            steps.send(None)
    except StopIteration:
        return
