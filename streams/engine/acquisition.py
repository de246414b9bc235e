"""What acquiring a partition finds out before it may process: whose logs these are, and where the state is in them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from faust.types import TP

from streams.engine.checkpoints import CheckpointedPartitions
from streams.engine.last_record import reread
from streams.engine.partition_host import PartitionHost, PartitionsConfig
from streams.engine.proof import Found, Names, Proven, expired_line, prove
from streams.storage.identity import Identity
from streams.storage.store import PartitionStore
from streams.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

BOUNDS_ATTEMPTS, BOUNDS_RETRY_S = 3, 1.0
"""How often, and how long apart, the end of the source log is read again if the state is beyond it."""


class ProvenPartitions(CheckpointedPartitions):
    """Partitions whose state is proved to be that of the logs at hand; `Partitions` acquires and revokes them."""

    app: Any
    """The Faust app, set before the service starts."""

    def __init__(self, config: PartitionsConfig, host: PartitionHost, metrics: Metrics, **kwargs: Any) -> None:
        super().__init__(config, host, metrics, **kwargs)
        self.cluster = config.clients.cluster(config.client)
        """The cluster as the broker describes it."""

    async def _identity(self) -> Identity:
        """Return what a state at hand must be derived from, as the broker reports it now."""
        source, changelog = self._config.source_topic, self._config.changelog_topic
        view = await self.cluster.view([source, changelog])
        return view.identity(source=source, changelog=changelog, layout=self._config.layout)

    async def _committed(self, source: TP) -> tuple[int | None, str]:
        """Return the committed offset and its metadata, read after fencing: no predecessor can still advance it."""
        thread = self.app.consumer._thread
        found = await thread.call_thread(thread._ensure_consumer()._coordinator.fetch_committed_offsets, [source])
        each = found.get(source)
        return (each.offset, each.metadata) if each is not None and each.offset >= 0 else (None, "")

    async def _prove(
        self, source: TP, store: PartitionStore, identity: Identity, committed: tuple[int | None, str]
    ) -> Proven:
        """Return where the partition continues, after a check that the restored state is that of this log."""
        mark = store.mark()
        earliest, end = await self.bounds(source, mark.source_offset if mark else 0)
        last = await reread(source, self._config.client, mark, earliest, end, self._config.clients)
        proven = prove(self.names(source.partition), Found(mark, *committed, earliest, end, identity, last))
        for line in proven.lines:
            logger.warning("%s", line)
        if proven.rewound:
            self._metrics.offsets_rewound.inc()
        if proven.expired:
            self.report_expired(source.partition, proven.expired, proven.mark.source_offset - proven.expired)
        return proven

    def names(self, number: int) -> Names:
        """Return the names that messages about a partition need."""
        config = self._config
        return Names(config.app_id, config.source_topic, config.changelog_topic, number)

    async def bounds(self, source: TP, position: int) -> tuple[int, int]:
        """Return the first offset of the source log, and the one after its last stable record.

        If that is before `position`, it is read again: a new leader may not have caught up with its own log.
        """
        consumer = self.app.consumer
        for attempt in range(BOUNDS_ATTEMPTS):
            await asyncio.sleep(BOUNDS_RETRY_S if attempt else 0)
            end = (await consumer.highwaters(source))[source]
            if position <= end:
                break
        return (await consumer.earliest_offsets(source))[source], end

    def report_expired(self, number: int, lost: int, begin: int) -> None:
        """Log and count events that retention deleted before they were read."""
        logger.error("%s", expired_line(self.names(number), lost, begin))
        self._metrics.events_expired.inc(lost)
