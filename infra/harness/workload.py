"""Produce the events of a run: numbered actions of many users, at a modest rate, from a seed, with trouble on request.

Each user's actions are numbered from 1, and the number is sent as the duration, so that a checker can name the action.
`WorkloadOptions` set the trouble, and faults exchange them while the workload runs: duplicates (the same event and
event id again), disorder (events that arrive after younger ones), records that are no actions, oversized records,
tombstones, and an upstream that produces in transactions, some of which it aborts.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiokafka
from aiokafka.errors import KafkaError

from infra.harness.events import REQUEST_BYTES_MAX, Event, partition_of
from infra.harness.releases import ACTION_NAMES, ITEMS, SURFACES
from streams.config.settings import Settings

logger = logging.getLogger(__name__)

TICK_S = 0.05
OVERSIZED_BYTES = (70_000, 400_000, 1_900_000)
"""Sizes above the limit of a value; the last one, like its dead letter, is close to the limit of the broker."""


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """Behaviour of the producer; fractions are per event."""

    rate: float = 500.0
    """Events per second."""
    duplicates: float = 0.01
    disorder: float = 0.02
    poison: float = 0.0
    oversized: float = 0.0
    tombstones: float = 0.001
    transactional: bool = False
    """Produce each tick in one transaction, and abort one in five."""


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
        self.options = options or WorkloadOptions()
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

    @contextmanager
    def changed(self, **options: Any) -> Iterator[None]:
        """Produce with other options until the block ends."""
        before = self.options
        self.options = replace(before, **options)
        try:
            yield
        finally:
            self.options = before

    def calm(self, timeout_s: float) -> bool:
        """Send nothing more until `options` are set again.

        Returns True once every event sent has been acknowledged or given up, False if that takes longer.
        """
        self._calm.clear()
        self.options = replace(self.options, rate=0.0)
        return self._calm.wait(timeout_s)

    def _run(self) -> None:
        try:
            asyncio.run(self._produce())
        except BaseException as error:
            self.failure = error

    async def _produce(self) -> None:
        """Tick until stopped; after a failure of the broker a new producer continues with the next events."""
        while not self._stopping.is_set():
            transactional = self.options.transactional
            producer = self._producer(transactional)
            try:
                await producer.start()
                while not self._stopping.is_set() and self.options.transactional == transactional:
                    await self._tick(producer, transactional)
            except KafkaError as error:
                logger.debug("starting a new producer after %r", error)
                self.sent["failures"] += 1
                await asyncio.sleep(0.5)
            finally:
                await producer.stop()

    def _producer(self, transactional: bool) -> Any:
        options: dict[str, Any] = {}
        if transactional:
            options = {"transactional_id": f"{self._settings.app_id}-upstream", "transaction_timeout_ms": 10_000}
        return aiokafka.AIOKafkaProducer(
            bootstrap_servers=self._settings.kafka.bootstrap_servers,
            acks="all",
            enable_idempotence=True,
            max_request_size=REQUEST_BYTES_MAX,
            request_timeout_ms=60_000,
            **options,
        )

    async def _tick(self, producer: Any, transactional: bool) -> None:
        started = time.monotonic()
        is_calm = not self.options.rate
        messages = [self._message() for _ in range(self._count())]
        if transactional and messages:
            await producer.begin_transaction()
        pending = [await self._send(producer, key, value) for key, value in messages]
        await asyncio.gather(*pending)
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

    async def _send(self, producer: Any, key: bytes | None, value: bytes | None) -> Any:
        partition = partition_of(key, self._settings.topics.partitions)
        return await producer.send(self._settings.topics.actions, value, key=key, partition=partition)

    def _message(self) -> Event:
        options, draw = self.options, self._random.random()
        user = self._users[int(len(self._users) * self._random.random() ** 2)]
        if draw < options.poison:
            return self._poison(user)
        if draw < options.poison + options.oversized:
            size = self._random.choice(OVERSIZED_BYTES)
            return user.name.encode(), b'{"user_id": "' + b"x" * size + b'"}'
        if draw < options.poison + options.oversized + options.tombstones:
            return user.name.encode(), None
        if user.last and self._random.random() < options.duplicates:
            return user.name.encode(), user.last
        return self._action(user)

    def _action(self, user: _User) -> tuple[bytes, bytes]:
        """Return the user's next action; four in five have an event id, and only those are ever sent twice."""
        user.number += 1
        late_ms = self._random.randrange(20_000) if self._random.random() < self.options.disorder else 0
        event: dict[str, Any] = {
            "user_id": user.name,
            "item_id": f"item-{self._random.randrange(ITEMS)}",
            "action": self._random.choice(ACTION_NAMES),
            "timestamp_ms": time.time_ns() // 1_000_000 - late_ms,
            "duration_ms": user.number,
        }
        if self._random.random() < 0.5:
            event["surface"] = self._random.choice(SURFACES)
        if self._random.random() < 0.8:
            event["event_id"] = f"{user.name}/{user.number}"
        value = json.dumps(event).encode()
        user.last = value if "event_id" in event else b""
        return user.name.encode(), value

    def _poison(self, user: _User) -> Event:
        key, value = self._action(_User(user.name, user.number))
        event = json.loads(value)
        kinds: list[Event] = [
            (None, value),
            (b"\xff\xfe", None),
            (b"another-user", value),
            (key, value.replace(b'"item-', b'"\xff')),
            (key, value[:-1]),
            (key, b""),
            (key, b"[]"),
            (key, b"null"),
            (key, b"\0\0\0\0\1"),
            *((key, json.dumps({**event, **wrong}).encode()) for wrong in WRONG_FIELDS),
            (key, json.dumps({name: event[name] for name in event if name != "item_id"}).encode()),
        ]
        return self._random.choice(kinds)


WRONG_FIELDS: tuple[dict[str, Any], ...] = (
    {"timestamp_ms": float("nan")},
    {"timestamp_ms": 1_700_000_000},
    {"timestamp_ms": 0},
    {"timestamp_ms": 2**53},
    {"timestamp_ms": "now"},
    {"item_id": ""},
    {"item_id": "x" * 300},
    {"item_id": None},
    {"duration_ms": -1},
    {"duration_ms": 2**40},
    {"user_id": 7},
)
