"""A lane: the way into one partition of an output topic, in order, over producers that are replaced when they must be.

aiokafka's idempotent producer counts the records of a batch when it takes the batch from its queue, not when the broker
accepts it. After one refused batch the broker therefore rejects every later one of that partition, for ever, and after
2^31 records the count turns negative. So a lane moves to another producer after any failed batch, and well before the
count runs out. It first waits until the results of everything in flight are known, which keeps the order. Other lanes
of the same producer are not affected, because the count is one per partition.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from streams.engine.packing import send_packed
from streams.engine.producers import Lease, ProducerPool
from streams.wire.embeddings import Message

logger = logging.getLogger(__name__)

RETRY_FIRST_S, RETRY_MAX_S = 0.05, 1.0
"""Delays before a producer is replaced: they double with each failure in a row."""
SLOW_S = 0.5
"""Age of an unacknowledged call at which a lane is busy: what would only wait behind it is better not begun."""
RECORDS_MAX = 1 << 30
"""Records of one lane by one producer, half of what aiokafka can count."""


class Lane:
    """Appends messages to one partition."""

    def __init__(
        self,
        tp: TopicPartition,
        pool: ProducerPool,
        *,
        batch_bytes: Callable[[], int],
        records_max: int = RECORDS_MAX,
    ) -> None:
        self.tp, self._pool, self._batch_bytes, self._records_max = tp, pool, batch_bytes, records_max
        self._turn = asyncio.Lock()
        self._lease: Lease | None = None
        self._records = 0
        """Records given to the present producer."""
        self._is_broken = False
        """True after a failed batch: the present producer must be replaced."""
        self._in_flight: set[asyncio.Future[Any]] = set()
        self._calls = count()
        self._waiting: dict[int, float] = {}
        """Begin of each call that is not acknowledged yet, oldest first."""
        self._failures = 0
        """Failures since the last acknowledgement."""
        self._failing_since = 0.0
        self.last_error: str | None = None
        """Last failure; None after an acknowledgement."""

    @property
    def is_busy(self) -> bool:
        """True while a call would only wait: one is old, or one finds out whether the partition takes records again."""
        oldest_s = self.unacknowledged_s()
        return bool(self._waiting) and (self._failures > 0 or oldest_s > SLOW_S)

    def unacknowledged_s(self) -> float:
        """Return for how long the oldest unacknowledged messages have been waiting; failures count as one wait."""
        since = [next(iter(self._waiting.values()))] if self._waiting else []
        if self._failures:
            since.append(self._failing_since)
        return time.monotonic() - min(since) if since else 0.0

    def reset(self) -> None:
        """Forget failures, because the partition has another owner now."""
        self._failures, self.last_error = 0, None

    async def settle(self) -> None:
        """Return once the outcome of every earlier call is known."""
        async with self._turn:  # calls get their turn in order
            in_flight = set(self._in_flight)
        if in_flight:
            await asyncio.wait(in_flight)

    async def append(self, messages: Sequence[Message]) -> int:
        """Append messages after those of earlier calls; return the offset after them once they are acknowledged.

        Raises what the broker or the client reports. It is then not known which of the messages were appended.
        """
        with self._wait():
            async with self._turn:
                acknowledged = await self._send(messages)
            return await acknowledged

    async def deliver(self, messages: Sequence[Message]) -> int:
        """Append messages and repeat that until they are acknowledged; later calls wait for their turn."""
        with self._wait():
            async with self._turn:
                while True:
                    try:
                        return await (await self._send(messages))
                    except Exception as error:
                        logger.warning(
                            "%d records of %s could not be delivered and are sent again: %r",
                            len(messages),
                            self.tp,
                            error,
                        )

    async def is_reachable(self) -> bool:
        """Return whether the partition has a leader that answers this client at present."""
        if self._lease is None:
            return False
        client = self._lease.producer.client
        try:
            async with asyncio.timeout(SLOW_S * 4):
                await client.force_metadata_update()
                leader = client.cluster.leader_for_partition(self.tp)
                return leader not in (None, -1) and bool(await client.ready(leader))
        except (KafkaError, TimeoutError):
            return False

    def abandon(self) -> None:
        """Give the producer up although messages are in flight: their calls fail, and they may still be appended."""
        if self._lease is not None:
            self._pool.discard(self._lease)

    @contextmanager
    def _wait(self) -> Iterator[None]:
        call = next(self._calls)
        self._waiting[call] = time.monotonic()
        try:
            yield
        finally:
            del self._waiting[call]

    async def _send(self, messages: Sequence[Message]) -> Awaitable[int]:
        try:
            producer = await self._usable_producer(len(messages))
            self._records += len(messages)
            return await send_packed(
                producer, self.tp, messages, batch_bytes=self._batch_bytes(), on_sent=self._note_sent
            )
        except Exception as error:
            self._note_failure(error)
            raise

    async def _usable_producer(self, records: int) -> Any:
        """Return the present producer or, where that cannot be used, another one after all results are in."""
        if self._lease is None or self._is_broken or self._records + records > self._records_max:
            if self._in_flight:
                await asyncio.wait(self._in_flight)
            if self._failures:
                await asyncio.sleep(min(RETRY_FIRST_S * 2.0 ** min(self._failures - 1, 10), RETRY_MAX_S))
            await self._replace()
        assert self._lease is not None
        return self._lease.producer

    async def _replace(self) -> None:
        old, self._lease = self._lease, None
        try:
            self._lease = await self._pool.lease(after=old)
        finally:
            if old is not None:
                self._pool.give_back(old)
        self._is_broken, self._records = False, 0

    def _note_sent(self, batch: asyncio.Future[Any]) -> None:
        self._in_flight.add(batch)
        batch.add_done_callback(self._note_result)

    def _note_result(self, batch: asyncio.Future[Any]) -> None:
        self._in_flight.discard(batch)
        if batch.cancelled():
            self._note_failure(KafkaError("the batch was cancelled"))
        elif (failure := batch.exception()) is not None:
            self._note_failure(failure)
        else:
            self._failures, self.last_error = 0, None

    def _note_failure(self, error: BaseException) -> None:
        self._is_broken, self.last_error = True, repr(error)
        if not self._failures:
            self._failing_since = time.monotonic()
        self._failures += 1
