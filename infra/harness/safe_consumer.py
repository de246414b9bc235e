"""An aiokafka consumer that passes what stops others: header names that are not UTF-8, and damaged batches.

It reads with the worker's own parser (`streams.engine.records`). A damaged batch is skipped, with a line in the log
that names topic, partition and offsets, so that what a reader counts can be explained.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Self

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from streams.engine.compat import install_overrides
from streams.engine.records import Parsing

logger = logging.getLogger(__name__)


class SafeConsumer:
    """A consumer without a group; its records are those of `streams.engine.records`, without topic and partition."""

    def __init__(self, client: Mapping[str, Any], **options: Any) -> None:
        """Take connection options and further ones of aiokafka's consumer."""
        install_overrides()
        self._parsing = Parsing(skip_corrupt=True)
        self.consumer = AIOKafkaConsumer(**client, enable_auto_commit=False, key_deserializer=self._parsing, **options)
        self.skipped = 0
        """Offsets of damaged batches that were passed over."""

    async def __aenter__(self) -> Self:
        """Connect; a failed attempt leaves nothing open."""
        try:
            await self.consumer.start()
        except BaseException:
            await self.consumer.stop()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close the connection."""
        await self.consumer.stop()

    async def take(self, *, timeout_ms: int, records_max: int) -> Mapping[TopicPartition, list[Any]]:
        """Return records by partition, at most `records_max`; none if none arrives in time.

        Raises `CorruptBatch` at a batch that cannot be skipped either: its codec is not installed.
        """
        fetched: Mapping[TopicPartition, list[Any]] = await self.consumer.getmany(
            timeout_ms=timeout_ms, max_records=records_max
        )
        for tp in list(self._parsing.skipped):
            for damaged in self._parsing.skipped.pop(tp):
                logger.warning("skipped: %s", damaged)
                self.skipped += damaged.last - damaged.first + 1
        for fault in self._parsing.faults.values():
            raise fault
        return fetched
