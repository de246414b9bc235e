"""The parts of one worker and how they are plugged together, without Faust, RocksDB or an encoder.

`streams.app` adds those. The simulation runs the same parts over transports in memory.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Collection
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

from encoder.inference import EncoderRuntime
from streams.core.features.partition import FeatureConfig
from streams.core.layout import StateLimits, share
from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.encoding.partition_jobs import PartitionJobs
from streams.encoding.queue import EncodeQueue, EncodeQueuePolicy
from streams.engine.delivery import RecordBatch
from streams.engine.outputs import Outputs, OutputsConfig
from streams.engine.own_records import OwnRecords, Published
from streams.engine.ownership import OwnedPartition
from streams.engine.partition_host import PartitionsConfig
from streams.engine.partitions import Partitions
from streams.errors import HaltsPartition, StopsWorker
from streams.ingest import InFlightLimits, Ingest
from streams.storage.codec import CheckpointMark
from streams.storage.store import PartitionStore
from streams.telemetry.metrics import Metrics
from streams.wire.actions import DecodeLimits

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PartsConfig:
    """The configuration of each part."""

    policy: TriggerPolicy
    state: StateLimits
    hot_users_worker_max: int
    """Users in memory, of all partitions together."""
    decode: DecodeLimits
    queue: EncodeQueuePolicy
    outputs: OutputsConfig
    partitions: PartitionsConfig
    checkpoint_events_max: int
    in_flight_max: InFlightLimits
    features: FeatureConfig | None = None
    """None for a worker that computes no features."""


class WorkerParts:
    """The parts of one worker; implements `streams.engine.partition_host.PartitionHost`."""

    def __init__(
        self,
        config: PartsConfig,
        runtime: EncoderRuntime,
        metrics: Metrics,
        *,
        now_ms: Callable[[], int],
        abort: Callable[[str], None],
        encoder_thread: Executor | None = None,
    ) -> None:
        self._config, self._now_ms = config, now_ms
        self.runtime, self.metrics, self.abort = runtime, metrics, abort
        self.outputs = Outputs(config.outputs, metrics, config.partitions.limits)
        self.partitions = Partitions(config.partitions, self, metrics)
        self.queue = EncodeQueue(runtime, config.queue, metrics, encoder_thread)
        self.ingest = Ingest(
            self.partitions,
            self.queue,
            self.outputs,
            metrics,
            limits=config.decode,
            checkpoint_events_max=config.checkpoint_events_max,
            now_ms=now_ms,
            in_flight_max=config.in_flight_max,
        )
        self._revoked_at: dict[int, int] = {}
        """Source offset at which this worker gave a partition back, by partition."""
        self._incarnations: dict[int, int] = {}

    async def on_batches(self, batches: Collection[RecordBatch]) -> None:
        """Apply what one fetch returned; a batch that fails stops its partition only, unless going on is unsafe."""
        for batch in batches:
            try:
                await self.ingest.on_batch(batch)
            except StopsWorker as error:
                self.abort(f"a batch of {batch.tp} could not be applied: {error}")
            except HaltsPartition as error:
                self.partitions.halt(batch.tp.partition, str(error))
            except Exception as error:
                logger.exception("a batch of %s could not be applied", batch.tp)
                reason = f"a batch could not be applied, so its state is read again: {error!r}"
                await self.partitions.restart(batch.tp.partition, reason)

    # -- PartitionHost: what the partitions need from the worker

    def new_state(self) -> PartitionState:
        """Return an empty state with this worker's policy, and its share of the worker's limits.

        The shares stay the same for as long as the state lives, because every assignment begins with new states.
        """
        return PartitionState(self._config.policy, self._shared_limits(), self._config.features)

    def _shared_limits(self) -> StateLimits:
        return share(self._config.state, self._config.hot_users_worker_max, len(self.partitions.assigned))

    def open_store(self, path: Path) -> PartitionStore:
        """Open or create the local database at `path`."""
        raise NotImplementedError

    def destroy_store(self, path: Path) -> None:
        """Delete the local database at `path`."""
        raise NotImplementedError

    def published_since(self, partition: int, mark: CheckpointMark) -> list[AsyncGenerator[Published] | None]:
        """Return what yields the embeddings and the features published after a mark; None where there is no topic."""
        config, features = self._config.outputs, self._config.features
        own = OwnRecords(self.runtime.version, features.feature_set.version if features else "", mark.source_id)
        topics = (config.embeddings_topic, mark.output_offset), (config.features_topic, mark.features_offset)
        return [
            self.outputs.published_since(topic, partition, offset, replace(own, is_features=index == 1))
            if topic
            else None
            for index, (topic, offset) in enumerate(topics)
        ]

    def on_ready(self, owned: OwnedPartition) -> None:
        """Begin to process a partition."""
        jobs = PartitionJobs(
            owned,
            self.outputs,
            self.metrics,
            encoder_version=self.runtime.version,
            incarnation=self._incarnation(owned),
            now_ms=self._now_ms,
        )
        self.ingest.add(owned, jobs)

    def _incarnation(self, owned: OwnedPartition) -> int:
        """Return a number that stays the same while no other worker can have advanced the partition's state.

        That is the case when the partition returns at the offset where this worker gave it back: the encoder's cache
        of its users is still valid. Otherwise the cache may stem from a history that the state does not have. With a
        TTL that may always be so: another worker may have forgotten users in the meantime, which takes no event.
        """
        number = owned.tp.partition
        returned_at = self._revoked_at.pop(number, None)
        if owned.rebuilt or self._config.state.user_ttl_ms or returned_at != owned.next_offset:
            self._incarnations[number] = self._incarnations.get(number, 0) + 1
        return self._incarnations[number]

    async def on_revoking(self, owned: Collection[OwnedPartition]) -> None:
        """Stop taking work for these partitions and let the encoder finish, for at most a quarter of the session."""
        for each in owned:
            self.ingest.remove(each)
            self._revoked_at[each.tp.partition] = each.next_offset
        await self.queue.wait_idle(self._config.partitions.session_timeout_ms / 1000 / 4)
        for each in owned:
            self.outputs.reset(each.tp.partition)

    def on_lost(self, owned: OwnedPartition) -> None:
        """Stop processing a partition that another worker has fenced, or whose state in memory cannot be used."""
        self.ingest.remove(owned)
        self.outputs.reset(owned.tp.partition)
