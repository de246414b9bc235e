"""Produce the events of a run: numbered actions of many users, at a modest rate, from a seed, with trouble on request.

Each user's actions are numbered from 1, and the number is sent as the duration, so that a checker can name the action.
`WorkloadOptions` set the trouble, and faults change them while the workload runs: duplicates (the same event and event
id again), disorder (events that arrive after younger ones), strange records (`poison`), oversized records, tombstones,
compression, and an upstream that produces in transactions, some of which it aborts.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import aiokafka
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from infra.harness import raw
from infra.harness.events import REQUEST_BYTES_MAX, partition_of
from infra.harness.poison import Outgoing, poison
from infra.harness.releases import ACTION_NAMES, ITEMS, SURFACES
from streams.config.settings import Settings

logger = logging.getLogger(__name__)

TICK_S = 0.05
OVERSIZED_BYTES = (70_000, 400_000, 1_900_000)
"""Sizes above the limit of a value; the last one, like its dead letter, is close to the limit of the broker."""
DELAYED_MS = (20_000, 10 * 86_400_000)
"""Least and greatest delay; each power of ten is as likely as the next."""
CODECS = ("gzip", "snappy", "lz4", "zstd")
CODEC_S = 2.0
"""Time after which a compressed workload goes on with another codec."""


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """Behaviour of the producer; fractions are per event."""

    rate: float = 500.0
    """Events per second."""
    duplicates: float = 0.01
    disorder: float = 0.02
    delayed: float = 0.02
    """Share of events that arrive minutes to days late: within the windows of features, and often older than
    everything that is kept of their user."""
    poison: float = 0.0
    oversized: float = 0.0
    tombstones: float = 0.001
    transactional: bool = False
    """Produce each tick in one transaction, and abort one in five."""
    compressed: bool = False
    """Compress the records, with another codec every `CODEC_S`."""
    avoided: frozenset[int] = frozenset()
    """Partitions to which nothing is sent, because they have no leader."""


@dataclass(slots=True)
class _User:
    name: str
    number: int = 0
    last: bytes = b""


class Workload:
    """Produces in a thread of its own between `start` and `stop`; `options` may be replaced at any time."""

    def __init__(
        self, settings: Settings, seed: int, *, users: int = 2_000, options: WorkloadOptions | None = None
    ) -> None:
        self._settings = settings
        self._random = random.Random(seed)
        self._users = [_User(f"user-{number}") for number in range(users)]
        self._base = self._options = options or WorkloadOptions()
        self._changes: list[dict[str, Any]] = []
        self._renewals = 0
        self.sent: Counter[str] = Counter()
        self._stopping, self._calm = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="workload", daemon=True)
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Start to produce."""
        self._thread.start()

    def stop(self) -> None:
        """Return once every event is acknowledged or given up; raise the error that ended the thread, if any."""
        self._stopping.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    @property
    def options(self) -> WorkloadOptions:
        """Options in force: those that were set, with the changes of every open `changed` block."""
        return self._options

    @options.setter
    def options(self, options: WorkloadOptions) -> None:
        self._base = options
        self._combine()

    @contextmanager
    def changed(self, **options: Any) -> Iterator[None]:
        """Produce with other options until the block ends; blocks may end in any order."""
        self._changes.append(options)
        self._combine()
        try:
            yield
        finally:
            self._changes = [each for each in self._changes if each is not options]
            self._combine()

    def _combine(self) -> None:
        changes: dict[str, Any] = {}
        for each in self._changes:
            changes |= each
        self._options = replace(self._base, **changes)

    def renew_producer(self) -> None:
        """Continue with a new producer, because the log has lost records of the present one."""
        self._renewals += 1

    def calm(self, timeout_s: float) -> bool:
        """Send nothing more until `options` are set again.

        Returns True once every event sent has been acknowledged or given up, False if that takes longer.
        """
        self._calm.clear()
        self.options = replace(self._base, rate=0.0)
        return self._calm.wait(timeout_s)

    def _run(self) -> None:
        try:
            asyncio.run(self._produce())
        except BaseException as error:
            self.failure = error

    async def _produce(self) -> None:
        """Tick until stopped; after a failure of the broker a new producer continues with the next events."""
        while not self._stopping.is_set():
            transactional, until_s, renewals = self.options.transactional, time.monotonic() + CODEC_S, self._renewals
            codec = self._random.choice(CODECS) if self.options.compressed else None
            producer = self._producer(transactional, codec)
            try:
                await producer.start()
                while not self._stopping.is_set() and (transactional, bool(codec), renewals) == self._mode:
                    await self._tick(producer, transactional)
                    if codec and time.monotonic() > until_s:
                        break
            except KafkaError as error:
                logger.debug("starting a new producer after %r", error)
                self.sent["failures"] += 1
                await asyncio.sleep(0.5)
            finally:
                await producer.stop()

    @property
    def _mode(self) -> tuple[bool, bool, int]:
        """Part of the options that takes a new producer to change."""
        return self.options.transactional, self.options.compressed, self._renewals

    def _producer(self, transactional: bool, codec: str | None) -> Any:
        options: dict[str, Any] = {}
        if transactional:
            options = {"transactional_id": f"{self._settings.app_id}-upstream", "transaction_timeout_ms": 10_000}
        return aiokafka.AIOKafkaProducer(
            bootstrap_servers=self._settings.kafka.bootstrap_servers,
            acks="all",
            enable_idempotence=True,
            max_request_size=REQUEST_BYTES_MAX,
            request_timeout_ms=60_000,
            compression_type=codec,
            **options,
        )

    async def _tick(self, producer: Any, transactional: bool) -> None:
        started = time.monotonic()
        is_calm = not self.options.rate
        messages = [message for _ in range(self._count()) if self._is_sendable(message := self._message())]
        if transactional and messages:
            await producer.begin_transaction()
        pending = [await self._send(producer, message) for message in messages]
        await asyncio.gather(*(each for each in pending if each is not None))
        if transactional and messages and self._random.random() < 0.2:
            await producer.abort_transaction()
            self.sent["aborted"] += len(messages)
        elif transactional and messages:
            await producer.commit_transaction()
        self.sent["events"] += len(messages)
        if is_calm:
            self._calm.set()
        await asyncio.sleep(max(0.0, TICK_S - (time.monotonic() - started)))

    def _count(self) -> int:
        """Return the number of events in this tick; its mean corresponds to the rate."""
        exact = self.options.rate * TICK_S
        return int(exact) + (self._random.random() < exact % 1)

    def _partition(self, message: Outgoing) -> int:
        own = partition_of(message.key, self._settings.topics.partitions)
        return own if message.partition is None else message.partition

    def _is_sendable(self, message: Outgoing) -> bool:
        return self._partition(message) not in self.options.avoided

    async def _send(self, producer: Any, message: Outgoing) -> Any:
        partition = self._partition(message)
        if message.raw_header:
            await self._send_raw(producer, partition, message)
            return None
        return await producer.send(
            self._settings.topics.actions,
            message.value,
            key=message.key,
            partition=partition,
            headers=list(message.headers),
        )

    async def _send_raw(self, producer: Any, partition: int, message: Outgoing) -> None:
        """Send a batch over a socket; it is lost if the leader is not the one that the producer knows."""
        cluster, topic = producer.client.cluster, self._settings.topics.actions
        leader = cluster.broker_metadata(cluster.leader_for_partition(TopicPartition(topic, partition)))
        if leader is None:
            return
        batch = raw.batch_with_header(message.key, message.value, message.raw_header)
        with suppress(OSError, RuntimeError, struct.error):
            await asyncio.to_thread(raw.produce, f"{leader.host}:{leader.port}", topic, partition, batch)

    def _message(self) -> Outgoing:
        options, draw = self.options, self._random.random()
        user = self._users[int(len(self._users) * self._random.random() ** 2)]
        if draw < options.poison:
            action = self._action(_User(user.name, user.number))
            return poison(*action, self._settings.topics.partitions, self._random)
        if draw < options.poison + options.oversized:
            size = self._random.choice(OVERSIZED_BYTES)
            return Outgoing(user.name.encode(), b'{"user_id": "' + b"x" * size + b'"}')
        if draw < options.poison + options.oversized + options.tombstones:
            return Outgoing(user.name.encode(), None)
        if user.last and self._random.random() < options.duplicates:
            return Outgoing(user.name.encode(), user.last)
        return Outgoing(*self._action(user))

    def _action(self, user: _User) -> tuple[bytes, bytes]:
        """Return the user's next action; four in five have an event id, and only those are ever sent twice."""
        user.number += 1
        late_ms = self._late_ms()
        event: dict[str, Any] = {
            "user_id": user.name,
            "item_id": f"item-{self._random.randrange(ITEMS)}",
            "action": self._random.choice(ACTION_NAMES),
            "timestamp_ms": time.time_ns() // 1_000_000 - late_ms,
            "duration_ms": user.number,
        }
        if self._random.random() < 0.5:
            event["surface"] = self._random.choice(SURFACES)
        if self._random.random() < 0.6:
            event["value"] = self._random.choice((0, 5, round(self._random.uniform(0.01, 500), 2)))
        if self._random.random() < 0.8:
            event["event_id"] = f"{user.name}/{user.number}"
        value = json.dumps(event).encode()
        user.last = value if "event_id" in event else b""
        return user.name.encode(), value

    def _late_ms(self) -> int:
        draw = self._random.random()
        if draw < self.options.disorder:
            return self._random.randrange(20_000)
        if draw < self.options.disorder + self.options.delayed:
            return int(DELAYED_MS[0] * (DELAYED_MS[1] / DELAYED_MS[0]) ** self._random.random())
        return 0
