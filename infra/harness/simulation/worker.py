"""A worker without Kafka, Faust or torch: the real decoding, state, codec, checkpoint and store around lists."""

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
    """A law is broken."""


class Died(Exception):
    """The worker is gone."""


class Disk(MemoryStore):
    """A store that remembers what each write left, so that a crash can take the last ones back."""

    def __init__(self) -> None:
        super().__init__(records_per_write=2)
        self.effect: Callable[[str], None] = lambda _: None
        self._past: deque[dict[bytes, bytes]] = deque([{}], maxlen=6)

    def write_steps(self, records: Sequence[Record], changelog_offset: int) -> Iterator[None]:
        steps = super().write_steps(records, changelog_offset)
        while True:
            self.effect("store")
            if next(steps, steps) is steps:
                return
            self._past.append(dict(self.records))
            yield

    def crash(self, lost_writes: int) -> None:
        """Forget the last writes, or all that is remembered."""
        for _ in range(min(lost_writes, len(self._past) - 1)):
            self._past.pop()
        self.records = dict(self._past[-1])


@dataclass
class Sent:
    """Outputs on their way to the broker."""

    outputs: list[Output]
    job: EncodeJob | None
    delivered: bool = False


@dataclass
class Worker:
    """One life of a worker that owns the partition. Everything public is for the checks to look at."""

    broker: Broker
    disk: Disk
    policy: TriggerPolicy
    version: int
    now_ms: int
    effect: Callable[[str], None]
    """Called right before each side effect; may raise."""
    on_applied: Callable[[int, int], None]
    """Called with each range of offsets that has been applied for the first time in this life."""
    refused: set[int] = field(default_factory=set)
    queue: dict[bytes, int] = field(default_factory=dict)
    jobs: deque[EncodeJob] = field(default_factory=deque)
    sent: deque[Sent] = field(default_factory=deque)
    handed_over_ms: dict[bytes, int] = field(default_factory=dict)
    """Processing time of each user's last hand-over, or of the acknowledgement that followed."""
    unencoded_since_ms: dict[bytes, int] = field(default_factory=dict)
    """Processing time of the oldest action applied in this life that no job contains."""
    shed_users: set[bytes] = field(default_factory=set)

    def start(self) -> None:
        """Fence, restore, prove, note what was published."""
        self.started_ms = self.now_ms
        self.epoch = self.broker.fence()
        self.disk.effect = self.effect
        self._restore()
        mark = self.disk.mark()
        committed = self.broker.committed_offset
        if (mark.source_offset if mark else None) != committed:
            raise Violation(f"restored mark {mark} but committed offset {committed}")
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
        """Process the next records, in batches whose users fit into memory."""
        end = min(self.next_offset + records, len(self.broker.source))
        while self.next_offset < end:
            cut = min(end, self.next_offset + LIMITS.hot_users_max)
            self.process(self.next_offset, cut)
            self.on_applied(self.next_offset, cut)
            self.next_offset = cut

    def process(self, begin: int, end: int) -> None:
        """Apply records [begin, end) as one batch."""
        records = self.broker.source[begin:end]
        decoded = decode_actions(records, now_ms=self.now_ms, limits=DECODE)
        self.refused |= {records[each.index].offset for each in decoded.rejected}
        if len(decoded.actions):
            self.load(decoded.actions.users)
            self._perform(self.state.apply(decoded.actions, self.now_ms))

    def load(self, users: Sequence[bytes]) -> None:
        """Bring users into memory, at the cost of a checkpoint, or of draining the encoder, when it is full."""
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

    def wake(self) -> None:
        """Do all that has fallen due."""
        for _ in range(100):
            due_ms = self.state.next_deadline_ms
            if due_ms is None or due_ms > self.now_ms:
                return
            effects = self.state.fire_timers(self.now_ms)
            self._perform(effects)
            for user in effects.to_load:
                self.load([user])
        raise Violation("waking does not come to an end")

    def _perform(self, effects: Effects) -> None:
        for user, priority in zip(effects.due, effects.priorities.tolist(), strict=True):
            if user in self.queue:
                raise Violation(f"{user!r} was handed over while it waits")
            if self.now_ms < self.handed_over_ms.get(user, -(10**9)) + self.policy.cooldown_ms:
                raise Violation(f"{user!r} was handed over within its cooldown")
            self.queue[user] = priority
            self.shed_users.discard(user)
            self.handed_over_ms[user] = self.now_ms
        if effects.forgotten:
            pairs = zip(effects.forgotten, effects.forgotten_offsets.tolist(), strict=True)
            self.sent.append(Sent([Output(user, None, offset) for user, offset in pairs], None))

    # -- encoding

    def encode(self, users: int) -> None:
        """The encoder takes the most valuable users."""
        taken = sorted(self.queue, key=lambda user: -self.queue[user])[:users]
        for user in taken:
            del self.queue[user]
        job = self.state.begin_job(taken)
        for user in job.sequences.users:
            self.unencoded_since_ms.pop(user, None)
        if len(job):
            self.jobs.append(job)

    def publish(self) -> None:
        """Hand the oldest encoded job to the producer."""
        if not self.jobs:
            return
        job = self.jobs.popleft()
        job = job.select(self.state.drop_outdated(job))
        starts, items = job.sequences.starts.tolist(), job.sequences.actions["item"].tolist()
        outputs = [
            Output(user, self.version, int(job.offsets[row]), tuple(items[starts[row] : starts[row + 1]]))
            for row, user in enumerate(job.sequences.users)
        ]
        self.sent.append(Sent(outputs, job))

    def deliver(self, outputs: int) -> None:
        """The broker receives the oldest outputs on their way, in order."""
        for sent in [sent for sent in self.sent if not sent.delivered][:outputs]:
            self.broker.outputs += sent.outputs
            sent.delivered = True

    def acknowledge(self) -> None:
        """Hear of what the broker has received."""
        while self.sent and self.sent[0].delivered:
            sent = self.sent.popleft()
            self.output_offset += len(sent.outputs)
            if sent.job is not None:
                users = sent.job.sequences.users
                self.state.finish_job(users, sent.job.offsets, self.now_ms)
                self.handed_over_ms |= dict.fromkeys(users, self.now_ms)

    def shed(self, delay_ms: int) -> None:
        """Shed the least valuable user of the queue."""
        if self.queue:
            user = min(self.queue, key=lambda user: self.queue[user])
            del self.queue[user]
            self.handed_over_ms.pop(user, None)
            self.shed_users.add(user)
            self.state.requeue([user], self.now_ms, delay_ms)

    def drain(self) -> None:
        """Encode and publish all that is due."""
        while self.queue or self.jobs or self.sent:
            self.encode(100)
            self.publish()
            self.deliver(100)
            self.acknowledge()
        self._checkpoint_for_room()

    # -- checkpoints

    def checkpoint(self) -> None:
        """Run the real checkpoint; raises what `effect` raises, and `Fenced`."""
        mark = CheckpointMark(self.next_offset, self.output_offset)
        transaction = Transaction(self.broker, self.epoch, self.effect)
        run(checkpoint(self.state, mark, self, transaction, self.disk))

    async def acknowledged(self) -> None:
        """All outputs reach the broker (the port `Outputs`)."""
        self.effect("outputs")
        self.deliver(len(self.sent))


def run(steps: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine that waits for nothing outside."""
    try:
        while True:
            steps.send(None)
    except StopIteration:
        return
