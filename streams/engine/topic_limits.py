"""The sizes that the output topics and the broker accept, read from their configuration at start and after a refusal.

A user without the right to describe configurations gets the defaults; then only refusals reveal a lower limit.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from streams.engine.packing import BATCH_BYTES_MAX

logger = logging.getLogger(__name__)

READ_S = 10.0
REFRESH_S = 1.0
"""Least time between two reads that refusals ask for."""
REQUEST_OVERHEAD_BYTES = 16_384
"""Bound of what a produce request adds to its batches."""
TOPIC_LIMIT, REQUEST_LIMIT = "max.message.bytes", "socket.request.max.bytes"


class TopicLimits:
    """The largest batch and the largest record per topic; one object per worker."""

    def __init__(self, client: Mapping[str, Any], topics: Iterable[str], *, partitions: int = 1) -> None:
        self._client, self._topics, self._partitions = client, tuple(topics), partitions
        self._batch_max: dict[str, int] = {}
        self._request_max: int | None = None
        self._read_at = 0.0

    def batch_bytes(self, topic: str) -> int:
        """Return the size up to which records of `topic` are packed into one batch."""
        # A request may hold a batch of each partition.
        by_request = BATCH_BYTES_MAX if self._request_max is None else self._request_max // self._partitions
        return max(1, min(BATCH_BYTES_MAX, self._batch_max.get(topic, BATCH_BYTES_MAX), by_request))

    def record_bytes(self, topic: str) -> int | None:
        """Return the size of the largest batch of a single record that is accepted; None if it is not known."""
        known = [self._batch_max[topic]] if topic in self._batch_max else []
        if self._request_max is not None:
            beside_others = self._request_max - self._partitions * self.batch_bytes(topic)
            known.append(max(beside_others, self._request_max // self._partitions))
        return min(known, default=None)

    async def read(self) -> None:
        """Read the limits; keep those that were known where that fails."""
        self._read_at = time.monotonic()
        try:
            async with asyncio.timeout(READ_S):
                await self._read()
        except (KafkaError, TimeoutError, OSError) as error:
            logger.warning("the size limits of the topics cannot be read, so the known ones are used: %r", error)

    async def refresh(self) -> None:
        """Read the limits again after a refusal, at most once per second."""
        if time.monotonic() - self._read_at >= REFRESH_S:
            await self.read()

    async def _read(self) -> None:
        admin = AIOKafkaAdminClient(**self._client)
        await admin.start()
        try:
            topics = await self._describe(admin, ConfigResourceType.TOPIC, self._topics)
            nodes = [str(broker.nodeId) for broker in admin._client.cluster.brokers()]
            brokers = await self._describe(admin, ConfigResourceType.BROKER, nodes)
        finally:
            await admin.close()
        self._batch_max |= {name: int(value) for name, key, value in topics if key == TOPIC_LIMIT}
        requests = [int(value) - REQUEST_OVERHEAD_BYTES for _, key, value in brokers if key == REQUEST_LIMIT]
        self._request_max = max(1, min(requests)) if requests else self._request_max
        missing = sorted(set(self._topics) - self._batch_max.keys())
        if missing:
            assumed = f"batches of up to {BATCH_BYTES_MAX} bytes are assumed"
            logger.warning("the right DescribeConfigs on %s is missing: %s", ", ".join(missing), assumed)

    async def _describe(
        self, admin: AIOKafkaAdminClient, kind: ConfigResourceType, names: Sequence[str]
    ) -> list[tuple[str, str, str]]:
        key = TOPIC_LIMIT if kind is ConfigResourceType.TOPIC else REQUEST_LIMIT
        if not names:
            return []
        answers = await admin.describe_configs([ConfigResource(kind, name, {key: None}) for name in names])
        return list(_entries(answers))


def _entries(answers: Iterable[Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (resource, key, value) of every entry that may be read."""
    for answer in answers:
        for resource in answer.resources:
            error_code, _, _, name, entries = resource[:5]
            if error_code == 0:
                yield from ((name, entry[0], entry[1]) for entry in entries if entry[1] is not None)
