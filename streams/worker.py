"""The worker: everything plugged together, started, watched and stopped.

A worker is crash-only where it matters: whenever going on would risk an event, `abort` ends the process with one line,
and the successor continues from the last checkpoint. SIGTERM drains: what is in flight is published, every partition is
checkpointed, and the process ends within `worker.shutdown_timeout_ms`; a second SIGTERM ends it at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Collection, Coroutine, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faust
from faust.types import TP
from rocksdict import Cache
from yarl import URL

from encoder.inference import EncoderRuntime, load_runtime
from streams.config.settings import Settings
from streams.core.layout import StateLimits
from streams.core.partition_state import PartitionState
from streams.core.triggers import TriggerPolicy, parse_policy
from streams.encoding.partition_jobs import PartitionSource
from streams.encoding.queue import EncodeQueue, EncodeQueuePolicy
from streams.engine.delivery import BatchTransport
from streams.engine.outputs import Outputs, OutputsConfig, Published
from streams.engine.ownership import OwnedPartition
from streams.engine.partitions import Partitions, PartitionsConfig
from streams.engine.recovery import with_take_over
from streams.engine.table import STORE_URL, TABLE_NAME, SequenceTable
from streams.errors import SettingsError
from streams.ingest import Ingest
from streams.storage.store import PartitionStore
from streams.telemetry.log_filter import RepeatFilter
from streams.telemetry.metrics import Metrics
from streams.telemetry.prometheus import HealthServer
from streams.telemetry.watchdog import Progress, Watchdog
from streams.wire.actions import DecodeLimits
from streams.wire.embeddings import EmbeddingCodec

logger = logging.getLogger(__name__)

ABORTED = 70
"""Exit code after `abort` (EX_SOFTWARE): the supervisor should start the worker again."""
FORCED = 71
"""Exit code when stopping took longer than allowed, or was forced by a second signal."""
WATCH_EVERY_S = 1.0
GIL_SWITCH_S = 0.0001
"""Python's default of 5 ms is how long the encoder thread would wait for the GIL after each of its torch calls."""
GC_THRESHOLDS = (50_000, 20, 20)
"""Allocations before a collection, and collections before one of the next generation. Python's default of 700 spends a
third of the CPU of ingestion on looking through records that no cycle ever holds."""
INFINITY = 2**62


def now_ms() -> int:
    """Processing time."""
    return time.time_ns() // 1_000_000


class Worker:
    """One worker process; implements `streams.engine.partitions.PartitionHost`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._policy = load_policy(settings)
        self._limits = StateLimits(
            sequence_length=settings.state.sequence_length,
            chunk_length=settings.state.chunk_length,
            hot_users_max=settings.state.hot_users_max,
            wake_users_max=min(settings.state.wake_users_max, settings.state.hot_users_max),
        )
        self._runtime = open_runtime(settings)
        self._cache = Cache(settings.checkpoint.store_cache_bytes)
        self._client = settings.kafka.client_options()
        self.metrics = Metrics()
        self._outputs = Outputs(outputs_config(settings, self._client))
        self._partitions = Partitions(partitions_config(settings, self._client), self, self.metrics)
        self._queue = EncodeQueue(self._runtime, queue_policy(settings), self.metrics)
        self._ingest = Ingest(
            self._partitions,
            self._queue,
            self._outputs,
            self.metrics,
            limits=DecodeLimits(**settings.decode.model_dump()),
            checkpoint_events_max=settings.checkpoint.events_max,
            now_ms=now_ms,
        )
        self.metrics.info.set(
            1, version=version("streamformer"), encoder_version=self._runtime.version, dtype=self._runtime.dtype
        )
        self._left: dict[int, int] = {}
        """Partition that was given back -> the source offset where that was."""
        self._lineages: dict[int, int] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._ticked_at = time.monotonic()
        self._stalled: str | None = None
        self.app = self._new_app()

    # -- Faust

    def _new_app(self) -> Any:
        settings = self._settings
        faust_dir = settings.data_dir / "faust"
        faust_dir.mkdir(parents=True, exist_ok=True)
        url = [URL(f"kafka://{server.strip()}") for server in settings.kafka.bootstrap_servers.split(",")]
        app = faust.App(
            settings.app_id,
            broker=url,
            broker_credentials=faust_credentials(settings),
            store=STORE_URL,
            datadir=str(faust_dir),
            topic_partitions=settings.topics.partitions,
            topic_allow_declare=False,
            topic_disable_leader=True,
            web_enabled=False,
            Table=SequenceTable,
            TableManager=with_take_over(self._partitions.take_over),
            stream_buffer_maxsize=4,  # fetches, not events
            consumer_auto_offset_reset="earliest",
            consumer_group_instance_id=settings.worker.instance_id,
            consumer_max_fetch_size=settings.kafka.fetch_bytes_max,
            broker_max_poll_records=settings.kafka.poll_records_max,
            broker_session_timeout=settings.kafka.session_timeout_ms / 1000,
            broker_heartbeat_interval=settings.kafka.heartbeat_interval_ms / 1000,
            broker_request_timeout=max(90.0, settings.kafka.session_timeout_ms / 1000 + 5),
        )
        app.transport = BatchTransport(
            url,
            app,
            batched_topics=frozenset({settings.topics.actions}),
            fetch_max_wait_ms=settings.kafka.fetch_max_wait_ms,
        )
        app.partitions = self._partitions
        self._partitions.app = app
        app.Table(TABLE_NAME, partitions=settings.topics.partitions, key_type=bytes, value_type=bytes)
        source = app.topic(settings.topics.actions, key_type=bytes, value_type=bytes, value_serializer="raw")
        app.agent(source, name="ingest")(self._ingest_stream)
        app.on_partitions_revoked.connect(self._on_revoked)
        return app

    async def _ingest_stream(self, stream: Any) -> None:
        async for batches in stream:
            for batch in batches:
                try:
                    await self._ingest.on_batch(batch)
                except Exception:
                    logger.exception("a batch of %s could not be applied", batch.tp)
                    self.abort(f"a batch of {batch.tp} could not be applied: the state may not be what it should be")

    async def _on_revoked(self, app: Any, revoked: set[TP], **kwargs: Any) -> None:
        await self._partitions.release()
        gc.collect()  # what was given back stands in cycles, which the collector would not look at for a long time

    # -- what partitions need (PartitionHost)

    def new_state(self) -> PartitionState:
        return PartitionState(self._policy, self._limits)

    def open_store(self, path: Path) -> PartitionStore:
        return PartitionStore.open(path, cache=self._cache)

    async def published_since(self, partition: int, offset: int) -> Published:
        return await self._outputs.published_since(partition, offset, self._runtime.version)

    def on_ready(self, owned: OwnedPartition) -> None:
        source = PartitionSource(
            owned,
            self._outputs,
            self.metrics,
            encoder_version=self._runtime.version,
            lineage=self._lineage(owned),
            now_ms=now_ms,
        )
        self._ingest.add(owned, source)

    def _lineage(self, owned: OwnedPartition) -> int:
        """The same number for a partition as long as nobody else can have gone on with its state in between.

        That is so when it comes back at the offset where this worker gave it back. The encoder's cache of its users
        is then still true; else it may stem from a past that the state does not have.
        """
        number = owned.tp.partition
        if owned.rebuilt or self._left.pop(number, None) != owned.next_offset:
            self._lineages[number] = self._lineages.get(number, 0) + 1
        return self._lineages[number]

    async def on_giving_back(self, owned: Collection[OwnedPartition]) -> None:
        for each in owned:
            self._ingest.remove(each)
            self._left[each.tp.partition] = each.next_offset
        await self._queue.settle(self._settings.kafka.session_timeout_ms / 1000 / 4)

    def on_lost(self, owned: OwnedPartition) -> None:
        self._ingest.remove(owned)

    def abort(self, reason: str) -> None:
        """End the process at once, without writing anything more."""
        logger.critical("stopping: %s", reason)
        logging.shutdown()
        os._exit(ABORTED)

    # -- life

    def run(self) -> int:
        """Run until a signal; returns the exit code."""
        sys.setswitchinterval(GIL_SWITCH_S)
        gc.freeze()  # modules and the model stay for good
        gc.set_threshold(*GC_THRESHOLDS)
        return asyncio.run(self._run())

    async def _run(self) -> int:
        stop = asyncio.Event()
        self._catch_signals(stop)
        await self._start()
        await stop.wait()
        return await self._stop()

    async def _start(self) -> None:
        await self._outputs.start()
        self._health = HealthServer(
            self.metrics,
            host=self._settings.web.host,
            port=self._settings.web.port,
            livez=self._livez,
            readyz=self._readyz,
        )
        logger.info("metrics at http://%s:%d/metrics", self._settings.web.host, self._health.port)
        self._spawn(self._queue.run(), "encode-queue")
        self._spawn(self._ingest.wake(), "timers")
        self._spawn(self._watch(), "watchdog")
        await self.app.start()

    async def _stop(self) -> int:
        """Drain, checkpoint and leave, within bounded time."""
        logger.info("stopping: draining, then a last checkpoint")
        try:
            async with asyncio.timeout(self._settings.worker.shutdown_timeout_ms / 1000):
                await self.app.stop()
                for task in self._tasks:
                    task.cancel()
                await self._outputs.stop()
        except TimeoutError:
            logger.critical("stopping took longer than worker.shutdown_timeout_ms: ending at once")
            os._exit(FORCED)
        self._queue.close()
        self._health.close()
        logger.info("stopped")
        return 0

    def _catch_signals(self, stop: asyncio.Event) -> None:
        def on_signal() -> None:
            if stop.is_set():
                logger.critical("second signal: ending at once")
                os._exit(FORCED)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        def on_done(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                logger.error("task %s failed", name, exc_info=task.exception())
                self.abort(f"task {name} failed: {task.exception()!r}")

        task = asyncio.create_task(work, name=name)
        task.add_done_callback(on_done)
        self._tasks.append(task)

    # -- health

    async def _watch(self) -> None:
        watchdog = Watchdog(self._settings.worker.watchdog_timeout_ms)
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            self._ticked_at = time.monotonic()
            if self.app.crashed:
                self.abort(f"Faust has crashed: {self.app.crash_reason!r}")
            self._stalled = watchdog.observe(self._progress(), now_ms())
            if self._stalled:
                self.abort(self._stalled)
            self._gauge()

    def _progress(self) -> dict[str, Progress]:
        waiting = INFINITY if self._queue.is_busy else 0
        encode_queue = Progress(int(self.metrics.encoded_users.value()), waiting)
        return {"encode queue": encode_queue, **self._partitions.progress()}

    def _gauge(self) -> None:
        metrics, ready = self.metrics, self._partitions.ready
        metrics.keep_partitions(self._partitions.assigned)
        metrics.queue_users.set(len(self._queue))
        metrics.hot_users.set(sum(owned.state.hot_users for owned in ready.values()))
        metrics.partitions.set(len(ready), state="ready")
        metrics.partitions.set(len(self._partitions.assigned) - len(ready), state="restoring")
        for number, owned in ready.items():
            end = self.app.consumer.highwater(owned.tp) or owned.next_offset
            metrics.processed_offset.set(owned.next_offset, partition=number)
            metrics.consumer_lag.set(max(0, end - owned.next_offset), partition=number)

    def _livez(self) -> str | None:
        silent_s = time.monotonic() - self._ticked_at
        if silent_s > self._settings.worker.watchdog_timeout_ms / 1000:
            return f"the event loop has not turned for {silent_s:.0f} s"
        return self._stalled

    def _readyz(self) -> str | None:
        if not self._partitions.assigned:
            return "no partition is assigned yet"
        restoring = len(self._partitions.assigned) - len(self._partitions.ready)
        if restoring:
            return f"{restoring} partitions are being restored"
        return None if self._queue.healthy else "the encoder fails or is stuck"


def load_policy(settings: Settings) -> TriggerPolicy:
    """The trigger policy of the settings; every action is a trigger where none is named."""
    path = settings.triggers.policy_file
    return TriggerPolicy() if path is None else parse_policy(path.read_text())


def open_runtime(settings: Settings) -> EncoderRuntime:
    """The encoder of the settings, on one thread: more cores are more workers."""
    encoder = settings.encoder
    if encoder.release_dir is None:
        remedy = "`streamformer train` makes one, `make demo` shows how"
        raise SettingsError([f"encoder.release_dir: is needed by the worker; {remedy}"])
    return load_runtime(
        encoder.release_dir,
        kind=encoder.runtime,
        cache_bytes_max=encoder.cache_bytes_max,
        threads=1,
        dtype=encoder.dtype,
    )


def queue_policy(settings: Settings) -> EncodeQueuePolicy:
    return EncodeQueuePolicy(**settings.queue.model_dump())


def outputs_config(settings: Settings, client: Mapping[str, Any]) -> OutputsConfig:
    return OutputsConfig(
        embeddings_topic=settings.topics.embeddings,
        dead_letter_topic=settings.topics.dead_letter,
        codec=EmbeddingCodec(settings.output.codec),
        client=client,
        request_timeout_ms=settings.output.request_timeout_ms,
    )


def partitions_config(settings: Settings, client: Mapping[str, Any]) -> PartitionsConfig:
    return PartitionsConfig(
        app_id=settings.app_id,
        source_topic=settings.topics.actions,
        changelog_topic=settings.changelog_topic,
        client=client,
        data_dir=settings.data_dir,
        checkpoint_interval_ms=settings.checkpoint.interval_ms,
        transaction_timeout_ms=settings.kafka.transaction_timeout_ms,
        session_timeout_ms=settings.kafka.session_timeout_ms,
        restores_max=settings.checkpoint.restores_max,
    )


def faust_credentials(settings: Settings) -> Any:
    """Kafka's security settings in Faust's words."""
    kafka, options = settings.kafka, settings.kafka.client_options()
    context = options.get("ssl_context")
    if kafka.security_protocol.startswith("SASL"):
        return faust.SASLCredentials(
            mechanism=kafka.sasl_mechanism,
            username=kafka.sasl_username,
            password=kafka.sasl_password.get_secret_value(),
            ssl_context=context,
        )
    return faust.SSLCredentials(context=context) if context is not None else None


def log_to_stderr(level: str) -> None:
    """Plain lines with time and level; Faust and aiokafka only from warnings on, and each of theirs once a second."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for library in ("faust", "aiokafka", "mode"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(RepeatFilter(exempt="streams"))
