"""One owned partition as the encode queue sees it: takes due users, publishes their embeddings, settles the outcome."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from aiokafka.errors import KafkaError

from encoder.arrays import F32
from streams.core.jobs import EncodeJob
from streams.core.policy import Reason
from streams.engine.outputs import Outputs
from streams.engine.ownership import OwnedPartition
from streams.telemetry.metrics import Metrics
from streams.wire.dead_letters import error_headers
from streams.wire.embeddings import EmbeddingBatch

logger = logging.getLogger(__name__)

LABELS = {int(reason): reason.label for reason in Reason}
REVISION_BITS = 32
"""Of a revision in the state; the lineage of the partition stands above them."""
PUBLISH_RETRY_MS = 500
"""When embeddings could not be published, their users are due again after this."""
SHED_RETRY_MS = 1_000
"""Users for whom the queue had no room are due again after this."""
REFUSED_RETRY_MS = 60_000
"""When the encoder cannot embed a user, it is tried again after this, or at the next action after it."""


class PartitionSource:
    """Implements `streams.encoding.queue.EncodeSource` for one owned partition."""

    def __init__(
        self,
        owned: OwnedPartition,
        outputs: Outputs,
        metrics: Metrics,
        *,
        encoder_version: str,
        lineage: int,
        now_ms: Callable[[], int],
    ) -> None:
        self._owned, self._outputs, self._metrics = owned, outputs, metrics
        self._lineage = lineage
        self._encoder_version, self._now_ms = encoder_version, now_ms

    def take(self, users: Sequence[bytes]) -> EncodeJob:
        """Revisions are told apart by lineage, so that a cache of another lineage fits nobody."""
        job = self._owned.state.begin_job(users)
        job.sequences.revisions[:] += self._lineage << REVISION_BITS
        return job

    async def publish(self, job: EncodeJob, embeddings: F32) -> None:
        """Publish what may still be published; on failure the users stay due and are handed over again later."""
        state = self._owned.state
        rows = state.drop_outdated(job)
        if len(rows) < len(job):
            job, embeddings = job.select(rows), embeddings[rows]
        if not len(job):
            return
        batch = self._batch(job, embeddings)
        try:
            end = await self._outputs.publish(self._owned.tp.partition, batch)
        except Exception as error:
            logger.warning("%d embeddings could not be published, they are encoded again: %r", len(job), error)
            self._metrics.publish_failures.inc(len(job))
            state.retry_job(job.sequences.users, self._now_ms(), PUBLISH_RETRY_MS)
            return
        self._owned.output_offset = max(end, self._owned.output_offset)
        now_ms = self._now_ms()
        state.finish_job(job.sequences.users, job.offsets, now_ms)
        self._metrics.embeddings_published.inc(len(job))
        self._metrics.freshness_seconds.observe_many((now_ms - job.newest_event_ms) / 1000)

    async def refuse(self, job: EncodeJob, detail: str) -> None:
        """Dead-letter users that the encoder cannot embed; their state stays as it is and they are tried again."""
        tp, state = self._owned.tp, self._owned.state
        for user, offset in zip(job.sequences.users, job.offsets.tolist(), strict=True):
            headers = error_headers(
                [], reason="encoder-failed", detail=detail, topic=tp.topic, partition=tp.partition, offset=offset
            )
            value = msgspec.json.encode({"user_id": user.decode(errors="replace")})
            try:
                await self._outputs.dead_letter(tp.partition, user, value, headers)
            except KafkaError as error:
                logger.warning("a dead letter of the encoder could not be sent: %r", error)
        state.retry_job(job.sequences.users, self._now_ms(), REFUSED_RETRY_MS)

    def shed(self, users: Sequence[bytes]) -> None:
        """Due again after a while; until then they wait in their state."""
        self._owned.state.requeue(users, self._now_ms(), SHED_RETRY_MS)

    def _batch(self, job: EncodeJob, embeddings: F32) -> EmbeddingBatch:
        sequences = job.sequences
        return EmbeddingBatch(
            users=sequences.users,
            vectors=embeddings,
            event_times_ms=job.newest_event_ms,
            sequence_lengths=np.diff(sequences.starts),
            reasons=[LABELS[reason] for reason in job.reasons.tolist()],
            source_offsets=job.offsets,
            encoder_version=self._encoder_version,
            encoded_at_ms=self._now_ms(),
        )
