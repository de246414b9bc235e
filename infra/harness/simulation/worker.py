"""A worker in memory: the product's own parts over the clients, clock, disk and encoder of the simulation."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from aiokafka.structs import TopicPartition

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32
from infra.harness.simulation.broker import Broker
from infra.harness.simulation.clients import CHANGELOG, OUTPUT, Consumer, Died, Link, clients_of
from infra.harness.simulation.clock import Clock, VirtualLoop
from streams.core.layout import StateLimits
from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.encoding.queue import EncodeQueuePolicy
from streams.engine.delivery import BatchConsumerThread, RecordBatch
from streams.engine.outputs import OutputsConfig
from streams.engine.ownership import OwnedPartition
from streams.engine.partition_host import PartitionsConfig
from streams.engine.records import Parsing
from streams.engine.topic_limits import TopicLimits
from streams.ingest import InFlightLimits
from streams.parts import PartsConfig, WorkerParts
from streams.storage.identity import layout_of
from streams.storage.memory_store import MemoryStore
from streams.storage.store import Record, StoreFailed
from streams.telemetry.metrics import Metrics
from streams.wire.actions import DecodeLimits
from streams.wire.embeddings import EmbeddingCodec

LIMITS = StateLimits(sequence_length=8, chunk_length=2, hot_users_max=4, wake_users_max=3)
QUEUE = EncodeQueuePolicy(users_max=5, batch_users_max=4, batch_ms=0.001, publishing_max=3, attempts_max=2)
APP, SOURCE, OUT, DEAD = "app", "actions", "embeddings", "dead-letters"
CHANGELOG_TOPIC = "changelog"
STREAM_FETCHES = 4
"""Fetches that wait to be ingested, as in Faust's stream."""
ITEM_BITS = 24
"""Bits of an item's key that a float32 holds exactly."""


class Disk(MemoryStore):
    """A store that keeps its contents after each write, so that a crash can undo the last writes."""

    def __init__(self, records: Mapping[bytes, bytes] | None = None) -> None:
        super().__init__(records_per_write=2)
        self.records |= records or {}
        self.link: Link | None = None
        self.failures = 0
        """Writes that fail next, as on a full disk."""
        self._past: deque[dict[bytes, bytes]] = deque([dict(self.records)], maxlen=6)

    def claim(self, log_id: str) -> None:
        """Record the identity of the changelog, with a side effect."""
        self._effect()
        super().claim(log_id)
        self._past.append(dict(self.records))

    def write_steps(self, records: Sequence[Record], changelog_offset: int) -> Iterator[None]:
        """Write one batch per step, with a side effect before each."""
        steps = super().write_steps(records, changelog_offset)
        while True:
            self._effect()
            if self.failures:
                self.failures -= 1
                raise StoreFailed("the disk is full")
            if next(steps, steps) is steps:
                return
            self._past.append(dict(self.records))
            yield

    def crash(self, lost_writes: int) -> None:
        """Undo the last writes, as far back as they are kept."""
        for _ in range(min(lost_writes, len(self._past) - 1)):
            self._past.pop()
        self.records = dict(self._past[-1])

    def _effect(self) -> None:
        if self.link is not None:
            self.link.effect()


class Encoder:
    """An encoder whose embedding is the sequence itself; like the real one it caches sequences by revision."""

    embedding_dim = sequence_length = actions_needed = LIMITS.sequence_length
    dtype = "float32"

    def __init__(self, version: str) -> None:
        self.version = version
        self.extensions = self.prefills = 0
        self.bad_users: set[bytes] = set()
        """Users on whom it raises."""
        self.failures = 0
        """Calls that raise, whoever is in them."""
        self._cache: dict[bytes, tuple[int, int, list[int]]] = {}
        """Revision, count and items of a user's last embedding."""

    def embed(self, batch: SequenceBatch) -> F32:
        """Return one row per user: its items, oldest first, and -1 where there are none."""
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the encoder failed")
        if self.bad_users.intersection(batch.users):
            raise RuntimeError("the encoder cannot embed one of these users")
        rows = np.full((len(batch.users), self.embedding_dim), -1, np.float32)
        for row, user in enumerate(batch.users):
            items = self._items(batch, row, user)
            rows[row, : len(items)] = items
        return rows

    def forget(self, users: Sequence[bytes]) -> None:
        """Drop what is cached of these users."""
        for user in users:
            self._cache.pop(user, None)

    def clear(self) -> None:
        """Drop everything that is cached."""
        self._cache.clear()

    def _items(self, batch: SequenceBatch, row: int, user: bytes) -> list[int]:
        """Append the new actions to what is cached under the same revision, as an incremental encoder does."""
        begin, end = int(batch.starts[row]), int(batch.starts[row + 1])
        given = [low_bits(item) for item in batch.actions["item"][begin:end].tolist()]
        revision, count = int(batch.revisions[row]), int(batch.counts[row])
        cached = self._cache.get(user)
        if cached is not None and cached[0] == revision and 0 <= count - cached[1] <= len(given):
            new = count - cached[1]
            given = (cached[2] + given[len(given) - new :])[-self.sequence_length :]
            self.extensions += 1
        else:
            self.prefills += 1
        self._cache[user] = revision, count, given
        return given


def low_bits(item: int) -> int:
    """Return the part of an item's key that an embedding of the simulation shows."""
    return item & ((1 << ITEM_BITS) - 1)


class EncoderThread(Executor):
    """Runs calls in order; while it is held, calls wait until the history lets them through."""

    def __init__(self) -> None:
        self.is_held = False
        self.waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a call at once, or keep it."""
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: fn(*args, **kwargs)))
        if not self.is_held:
            self.run(len(self.waiting))
        return future

    def run(self, calls: int) -> None:
        """Run the oldest calls."""
        for _ in range(min(calls, len(self.waiting))):
            future, call = self.waiting.popleft()
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do nothing."""


class Thread(BatchConsumerThread):
    """The product's fetching of record batches, on the worker's own event loop."""

    def __init__(self, app: App, consumer: Consumer) -> None:
        self.app, self.consumer, self._consumer = app, app.consumer, consumer
        self.log = SimpleNamespace(dev=lambda *args: None)
        self._joined_at, self._epochs, self._out_of_range = {}, {}, {}
        self._parsing = Parsing(report=True)
        consumer._key_deserializer = self._parsing

    async def call_thread(self, fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the function: there is no other thread."""
        return await fun(*args, **kwargs)


class FaustConsumer:
    """Faust's consumer, as far as the partitions use it."""

    flow_active = True
    in_transaction = False

    def __init__(self) -> None:
        self._thread: Any = None
        self._read_offset: dict[TopicPartition, int] = {}
        self.paused: set[TopicPartition] = set()

    def pause_partitions(self, tps: Collection[TopicPartition]) -> None:
        """Fetch these no more."""
        self.paused |= set(tps)

    def resume_partitions(self, tps: Collection[TopicPartition]) -> None:
        """Fetch these again."""
        self.paused -= set(tps)

    async def seek_wait(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Go on at other offsets."""
        await self._thread.seek_wait(offsets)

    async def earliest_offsets(self, *tps: TopicPartition) -> Mapping[TopicPartition, int]:
        """Return the first offset of each partition."""
        found: Mapping[TopicPartition, int] = await self._thread.earliest_offsets(*tps)
        return found

    async def highwaters(self, *tps: TopicPartition) -> Mapping[TopicPartition, int]:
        """Return the end of each partition."""
        found: Mapping[TopicPartition, int] = await self._thread.highwaters(*tps)
        return found


class App:
    """Faust's app, as far as the partitions use it."""

    consumer_generation_id = 1
    rebalancing = False
    conf = SimpleNamespace(broker_request_timeout=90.0)

    def __init__(self, link: Link, tps: Collection[TopicPartition]) -> None:
        self.consumer = FaustConsumer()
        consumer = Consumer(link, isolation_level="read_committed", group_id=APP)
        consumer.assign(tps)
        self.consumer._thread = Thread(self, consumer)


class KnownLimits(TopicLimits):
    """Size limits that no broker is asked for."""

    async def _read(self) -> None: ...


@dataclass
class Machine:
    """The disks of one host, by file name; they outlive its workers."""

    disks: dict[str, Disk] = field(default_factory=dict)

    def crash(self, lost_writes: int) -> None:
        """Undo the last writes."""
        for disk in self.disks.values():
            disk.crash(lost_writes)

    def copy(self) -> Machine:
        """Return a machine whose disks hold the same."""
        return Machine({name: Disk(disk.records) for name, disk in self.disks.items()})


class Watch(Protocol):
    """What a simulation sees of its worker while it happens."""

    def on_restored(self, owned: OwnedPartition) -> None:
        """See a partition that is about to be processed."""

    def on_handed_over(self, user: bytes, *, waits: bool) -> None:
        """See a user enter the encode queue, in which it may wait already."""

    def on_put_back(self, users: Sequence[bytes], until_ms: int) -> None:
        """See users leave the encode queue or a job without an embedding."""


class State(PartitionState):
    """The product's state, which reports what is put back."""

    watch: Watch | None = None

    def requeue(self, users: Sequence[bytes], now_ms: int, delay_ms: int) -> None:
        """Put back users that were shed."""
        if self.watch is not None:
            self.watch.on_put_back(users, now_ms + delay_ms)
        super().requeue(users, now_ms, delay_ms)

    def retry_job(self, users: Sequence[bytes], now_ms: int, delay_ms: int) -> None:
        """Put back users whose job failed."""
        if self.watch is not None:
            self.watch.on_put_back(users, now_ms + delay_ms)
        super().retry_job(users, now_ms, delay_ms)


class Worker(WorkerParts):
    """A worker process from its start to its death."""

    def __init__(
        self,
        broker: Broker,
        machine: Machine,
        policy: TriggerPolicy,
        version: str,
        *,
        clock: Clock,
        now_ms: Callable[[], int],
        wait_ms: float = 0.0,
        watch: Watch,
    ) -> None:
        self.loop, self.link, self.machine = VirtualLoop(clock), Link(broker), machine
        self.link.on_death = self._on_death
        for disk in machine.disks.values():
            disk.link = self.link
        self.thread, self.encoder = EncoderThread(), Encoder(version)
        self.aborted: str | None = None
        """Reason for which the worker ended itself."""
        self.watch: Watch | None = watch
        """What sees this worker; None once it is frozen."""
        self._blocked_ms: dict[OwnedPartition, int] = {}
        """Time at which a partition was last seen waiting for room, or held."""
        metrics = Metrics()
        super().__init__(
            _config(self.link, policy, wait_ms, len(broker.topics[SOURCE].logs)),
            self.encoder,
            metrics,
            now_ms=now_ms,
            abort=self._abort,
            encoder_thread=self.thread,
        )
        self.tps = [TopicPartition(SOURCE, number) for number in range(len(broker.topics[SOURCE].logs))]
        self.partitions.app = self.app = App(self.link, self.tps)
        self.partitions.loop = self.loop
        self._watch_queue()
        self._stream: asyncio.Queue[Collection[RecordBatch]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    def _watch_queue(self) -> None:
        queue: Any = self.queue
        put = queue.put

        def observed(owner: Any, users: Any, priorities: Any, reasons: Any) -> None:
            watch = self.watch
            for user in users:
                if watch is not None:
                    watch.on_handed_over(user, waits=user in queue._priority_of)
            put(owner, users, priorities, reasons)

        queue.put = observed

    # -- life

    def start(self, *, holds: bool = True) -> None:
        """Join the group, and acquire every partition as far as that needs no time; then hold what histories hold."""
        for work in (self._join(), self.queue.run(), self.ingest.run_timers(), self._ingest_all()):
            self._tasks.append(self.loop.create_task(work))
        self.loop.settle()
        self.hold(holds=holds)

    def hold(self, *, holds: bool) -> None:
        """Let outputs, steps of transactions and the encoder wait for the history, or no more."""
        self.thread.is_held = holds
        if holds:
            self.link.held = frozenset({OUTPUT, CHANGELOG})
            return
        for _ in range(3):
            self.link.release()
            self.thread.run(len(self.thread.waiting))
            self.loop.settle()

    def die(self) -> None:
        """End at once, and leave nothing running."""
        self.link.cut()
        self.loop.stopped = False
        for _ in range(20):
            left = asyncio.all_tasks(self.loop)
            if not left:
                break
            for task in left:
                task.cancel()
            self.loop.settle()
        self.loop.stopped = True

    @property
    def is_dead(self) -> bool:
        """Whether the worker has died."""
        return self.link.is_dead

    @property
    def failures(self) -> list[Any]:
        """What a task has raised that no task of a worker may raise."""
        ended = [task.exception() for task in self._tasks if task.done() and not task.cancelled()]
        unobserved = [each.get("exception", each) for each in self.loop.failures]
        return [each for each in (*ended, *unobserved) if each is not None]

    def _abort(self, reason: str) -> None:
        self.aborted = reason
        self.link.cut()
        raise Died(reason)

    def _on_death(self) -> None:
        self.loop.stopped = True

    async def _join(self) -> None:
        await self.outputs.start()
        changelogs = frozenset(TopicPartition(CHANGELOG_TOPIC, tp.partition) for tp in self.tps)
        self.app.consumer.pause_partitions(self.tps)
        await self.partitions.on_assigned(changelogs, self.app.consumer_generation_id)

    async def _ingest_all(self) -> None:
        while True:
            await self.on_batches(await self._stream.get())

    # -- what the history makes it do

    def poll(self, records: int, *, is_lost: bool = False) -> None:
        """Fetch records, as many at a time as there may be users in memory; with `is_lost` they reach no agent."""
        thread: Thread = self.app.consumer._thread
        while records > 0 and self._stream.qsize() < STREAM_FETCHES:
            active = [tp for tp in self.tps if tp not in self.app.consumer.paused]
            fetched = self.do(thread._fetch_records(thread._consumer, active, 0, min(records, LIMITS.hot_users_max)))
            if not fetched:
                return
            records -= sum(len(batch.records) for batch in fetched.values()) or records
            if not is_lost:
                self._stream.put_nowait(tuple(fetched.values()))

    def redeliver(self, batch: RecordBatch) -> None:
        """Receive a batch once more."""
        self._stream.put_nowait((batch,))

    def do(self, work: Any) -> Any:
        """Run a coroutine of this worker to its end, which needs no time."""
        task = self.loop.create_task(work)
        self.loop.settle()
        return task.result() if task.done() and not task.cancelled() else None

    def checkpoint(self) -> None:
        """Begin a checkpoint of every partition."""
        if not self.is_dead:
            self.do(self._checkpoint())

    async def _checkpoint(self) -> None:
        for owned in list(self.partitions.ready.values()):
            self.partitions.checkpoint_soon(owned)

    def run_until(self, at_s: float) -> None:
        """Live until then."""
        self.loop.run_until(at_s)

    def spawn(self, work: Any) -> None:
        """Begin a coroutine of this worker."""
        self.loop.create_task(work)

    def assign(self) -> None:
        """Get every partition again under a new generation of the group."""
        self.app.consumer_generation_id += 1
        self.do(self._join())

    def unwatch(self) -> None:
        """Report nothing more: the worker is frozen, and its partitions have a new owner."""
        self.watch = None
        for owned in self.partitions.ready.values():
            state: Any = owned.state
            state.watch = None

    def is_flowing(self, owned: OwnedPartition) -> bool:
        """Whether nothing keeps the partition from firing its timers now."""
        partition = owned.tp.partition
        blocked = (
            owned in self.ingest._firing or partition in self.partitions.held or partition in self.partitions.halted
        )
        if blocked:
            self._blocked_ms[owned] = self._now_ms()
        return not blocked

    def flows_since_ms(self, owned: OwnedPartition) -> int:
        """Return when the partition was last seen blocked."""
        return self._blocked_ms.get(owned, 0)

    # -- PartitionHost

    def new_state(self) -> PartitionState:
        """Return an empty state."""
        state = State(self._config.policy, self._shared_limits())
        state.watch = self.watch
        return state

    def open_store(self, path: Path) -> Any:
        """Open a local database of this machine."""
        disk = self.machine.disks.setdefault(path.name, Disk())
        disk.link = self.link
        return disk

    def destroy_store(self, path: Path) -> None:
        """Delete a local database."""
        self.link.effect()
        self.machine.disks[path.name] = Disk()

    def on_ready(self, owned: OwnedPartition) -> None:
        """Begin to process a partition."""
        if self.watch is not None:
            self.watch.on_restored(owned)
        super().on_ready(owned)


def _config(link: Link, policy: TriggerPolicy, wait_ms: float, partitions: int) -> PartsConfig:
    clients, limits = clients_of(link), KnownLimits({}, ())
    queue = EncodeQueuePolicy(
        **{name: getattr(QUEUE, name) for name in QUEUE.__dataclass_fields__} | {"wait_ms": wait_ms}
    )
    return PartsConfig(
        policy=policy,
        state=LIMITS,
        hot_users_worker_max=LIMITS.hot_users_max * partitions,
        decode=DecodeLimits(timestamp_ahead_max_ms=10**9),
        queue=queue,
        outputs=OutputsConfig(OUT, DEAD, EmbeddingCodec.FLOAT32, {}, request_timeout_ms=1_000, clients=clients),
        partitions=PartitionsConfig(
            app_id=APP,
            source_topic=SOURCE,
            changelog_topic=CHANGELOG_TOPIC,
            client={},
            data_dir=Path("/simulated"),
            checkpoint_interval_ms=1_000,
            transaction_timeout_ms=10_000,
            session_timeout_ms=6_000,
            source_partitions=partitions,
            layout=layout_of(LIMITS),
            limits=limits,
            clients=clients,
        ),
        checkpoint_events_max=1_000,
        in_flight_max=InFlightLimits(records=40),
    )
