"""The sweep that finds users without an action for `state.user_ttl_ms`, who are then forgotten (`streams.core.expiry`).

It reads the stored heads of a partition in pages, at a bounded rate, and takes no memory per user. So it also finds
users who were there before the TTL was set, and needs no record that would have to survive a restart. Users who may be
too old are loaded, and the core decides: a user may have acted since it was stored.

A worker that lags must not forget users whose actions it has not read yet. So a sweep begins with the time, asks the
broker for the end of the log, waits until everything up to that end is applied, and judges by that time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from aiokafka.errors import KafkaError

from streams.engine.ownership import OwnedPartition
from streams.engine.partitions import Partitions
from streams.errors import StreamformerError
from streams.ingest import Ingest
from streams.storage.reader import may_be_older

logger = logging.getLogger(__name__)

PAGE_USERS = 500
PAGE_EVERY_S = 0.02
"""Pause after each page: at most 25,000 users per second and worker."""
FIRST_AFTER_S = 30.0
"""Longest time from a start to the first sweep."""
INTERVAL_MIN_S, INTERVAL_MAX_S = 1.0, 6 * 3_600.0
CATCH_UP_EVERY_S = 0.1


class Expiry:
    """Sweeps the partitions of one worker, one after the other."""

    def __init__(self, ingest: Ingest, partitions: Partitions, ttl_ms: int, now_ms: Callable[[], int]) -> None:
        self._ingest, self._partitions, self._ttl_ms, self._now_ms = ingest, partitions, ttl_ms, now_ms

    async def run(self) -> None:
        """Sweep until cancelled, each time after a tenth of the TTL; return at once if there is none."""
        if not self._ttl_ms:
            return
        interval_s = min(max(self._ttl_ms / 10_000, INTERVAL_MIN_S), INTERVAL_MAX_S)
        await asyncio.sleep(min(interval_s, FIRST_AFTER_S))
        while True:
            for owned in list(self._partitions.ready.values()):
                try:
                    await self.sweep(owned)
                except (StreamformerError, KafkaError, TimeoutError) as error:  # of store or broker; later again
                    logger.warning("users of %s could not be looked at for their expiry: %r", owned.tp, error)
            await asyncio.sleep(interval_s)

    async def sweep(self, owned: OwnedPartition) -> None:
        """Forget every user of a partition who is too old by now, unless the partition is lost or paused on the way."""
        now_ms = self._now_ms()
        end = await self._partitions.read_end(owned)  # not before the time by which users are judged
        while owned.next_offset < end:
            await asyncio.sleep(CATCH_UP_EVERY_S)
            if not self._is_running(owned):
                return
        last, users_max = b"", max(1, min(PAGE_USERS, owned.state.limits.hot_users_max // 4))
        while self._is_running(owned) and (page := owned.store.heads_after(last, users_max)):
            last = page[-1][0]
            old = [user for user, head in page if may_be_older(user, head, now_ms - self._ttl_ms)]
            if old and not await self._ingest.expire(owned, old, now_ms):
                return
            await asyncio.sleep(PAGE_EVERY_S)

    def _is_running(self, owned: OwnedPartition) -> bool:
        number, partitions = owned.tp.partition, self._partitions
        is_paused = number in partitions.halted or number in partitions.held
        return partitions.ready.get(number) is owned and not is_paused
