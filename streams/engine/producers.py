"""Idempotent producers, started on demand, shared by the lanes that write with them, and closed within bounded time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from aiokafka.errors import KafkaError

logger = logging.getLogger(__name__)

STOP_S = 5.0
"""Time for which a producer may flush when it is closed; then its connections are closed under it."""


class Lease:
    """A producer and the number of lanes that write with it."""

    def __init__(self, producer: Any) -> None:
        self.producer = producer
        self.lanes = 0
        self.started = asyncio.ensure_future(producer.start())

    def is_usable(self) -> bool:
        """Return False once the start has failed."""
        return not (self.started.done() and (self.started.cancelled() or self.started.exception() is not None))


class ProducerPool:
    """Leases the newest producer; a lane whose producer cannot be used any more gets a newer one."""

    def __init__(self, new_producer: Callable[[], Any]) -> None:
        self._new_producer = new_producer
        self._newest: Lease | None = None
        self._open: set[Lease] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self.replaced = 0
        """Producers that took the place of another one so far."""

    async def lease(self, after: Lease | None = None) -> Lease:
        """Return a started producer that is newer than `after`; raise what its start raises."""
        if self._newest is None or self._newest is after or not self._newest.is_usable():
            self.replaced += self._newest is not None
            self._newest = Lease(self._new_producer())
            self._open.add(self._newest)
        lease = self._newest
        lease.lanes += 1
        try:
            await asyncio.shield(lease.started)
        except BaseException:
            self.give_back(lease)
            raise
        return lease

    def give_back(self, lease: Lease) -> None:
        """End a lane's use of a producer; one that no lane will use again is closed."""
        lease.lanes -= 1
        if not lease.lanes and (lease is not self._newest or not lease.is_usable()):
            self._close(lease)

    def discard(self, lease: Lease) -> None:
        """Close a producer although batches are in flight: they fail here, and the broker may have them or not."""
        self._close(lease, timeout_s=0.0)

    async def stop(self) -> None:
        """Flush and close every producer, within bounded time."""
        for lease in list(self._open):
            self._close(lease)
        if self._closing:
            await asyncio.wait(self._closing)

    def _close(self, lease: Lease, timeout_s: float = STOP_S) -> None:
        if lease not in self._open:
            return
        self._open.discard(lease)
        if self._newest is lease:
            self._newest = None
        lease.started.cancel()
        task = asyncio.ensure_future(stop_producer(lease.producer, timeout_s))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def stop_producer(producer: Any, timeout_s: float = STOP_S) -> None:
    """Flush and close an aiokafka producer; batches that are not acknowledged in time fail.

    Its own `stop` waits without a limit for batches of a partition that has no leader.
    """
    stopping = asyncio.ensure_future(producer.stop())
    await asyncio.wait({stopping}, timeout=timeout_s)
    if stopping.done():
        _log_failure(stopping)
        return
    producer._message_accumulator.fail_all(KafkaError("the producer was closed before the broker answered"))
    sender = producer._sender.sender_task
    if sender is not None:
        sender.cancel()
    await producer.client.close()  # ends the requests in flight, for which the cancelled sender waits
    await asyncio.wait({stopping}, timeout=STOP_S)
    stopping.cancel()


def _log_failure(stopping: asyncio.Future[Any]) -> None:
    if not stopping.cancelled() and (failure := stopping.exception()) is not None:
        logger.warning("a producer could not be closed in order: %r", failure)
