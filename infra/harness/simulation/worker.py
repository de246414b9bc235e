"""A worker in memory: the product's own parts over the clients, clock, disk and encoder of the simulation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from aiokafka.structs import TopicPartition

from infra.harness.simulation.broker import Broker
from infra.harness.simulation.clients import clients_of
from infra.harness.simulation.clock import Clock, VirtualLoop
from infra.harness.simulation.faust_app import APP, App
from infra.harness.simulation.features import feature_config
from infra.harness.simulation.history import History
from infra.harness.simulation.link import CHANGELOG, OUTPUT, Died, Link
from infra.harness.simulation.machine import LIMITS, Disk, Encoder, EncoderThread, Machine
from streams.core.jobs import EncodeJob
from streams.core.partition_state import PartitionState
from streams.encoding.queue import EncodeQueuePolicy
from streams.engine.delivery import RecordBatch
from streams.engine.outputs import OutputsConfig
from streams.engine.ownership import OwnedPartition
from streams.engine.partition_host import PartitionsConfig
from streams.engine.topic_limits import TopicLimits
from streams.expiry import Expiry
from streams.ingest import InFlightLimits
from streams.parts import PartsConfig, WorkerParts
from streams.storage.identity import layout_of
from streams.telemetry.metrics import Metrics
from streams.wire.actions import DecodeLimits
from streams.wire.embeddings import EmbeddingCodec

QUEUE = EncodeQueuePolicy(users_max=5, batch_users_max=4, batch_ms=0.001, publishing_max=3, attempts_max=2)
SOURCE, OUT, FEATURES, DEAD = "actions", "embeddings", "features", "dead-letters"
CHANGELOG_TOPIC = "changelog"
STREAM_FETCHES = 4
"""Fetches that wait to be ingested, as in Faust's stream."""


class KnownLimits(TopicLimits):
    """Size limits that no broker is asked for."""

    async def _read(self) -> None: ...


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

    def retry_job(self, job: EncodeJob, now_ms: int, delay_ms: int) -> None:
        """Put back users whose job failed."""
        if self.watch is not None:
            self.watch.on_put_back(job.sequences.users, now_ms + delay_ms)
        super().retry_job(job, now_ms, delay_ms)


class Worker(WorkerParts):
    """A worker process from its start to its death."""

    def __init__(
        self,
        broker: Broker,
        machine: Machine,
        history: History,
        version: str,
        *,
        clock: Clock,
        now_ms: Callable[[], int],
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
            _config(self.link, history, len(broker.topics[SOURCE].logs)),
            self.encoder,
            metrics,
            now_ms=now_ms,
            abort=self._abort,
            encoder_thread=self.thread,
        )
        self.tps = [TopicPartition(SOURCE, number) for number in range(len(broker.topics[SOURCE].logs))]
        self.partitions.app = self.app = App(self.link, self.tps)
        self.partitions.loop = self.loop
        self._expiry = Expiry(self.ingest, self.partitions, history.user_ttl_ms, now_ms)
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
        for work in (self._join(), self.queue.run(), self.ingest.run_timers(), self._ingest_all(), self._expiry.run()):
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
        thread = self.app.consumer._thread
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
        state = State(self._config.policy, self._shared_limits(), self._config.features)
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


def _config(link: Link, history: History, partitions: int) -> PartsConfig:
    clients, limits = clients_of(link), KnownLimits({}, ())
    queue = EncodeQueuePolicy(
        **{name: getattr(QUEUE, name) for name in QUEUE.__dataclass_fields__} | {"wait_ms": history.wait_ms}
    )
    return PartsConfig(
        policy=history.policy,
        state=replace(LIMITS, counts_too_old=history.features, user_ttl_ms=history.user_ttl_ms),
        hot_users_worker_max=LIMITS.hot_users_max * partitions,
        decode=DecodeLimits(timestamp_ahead_max_ms=10**9, with_values=history.features),
        queue=queue,
        outputs=OutputsConfig(
            OUT,
            DEAD,
            EmbeddingCodec.FLOAT32,
            {},
            request_timeout_ms=1_000,
            clients=clients,
            features_topic=FEATURES if history.features else "",
        ),
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
        features=feature_config(history.refresh_ms) if history.features else None,
    )
