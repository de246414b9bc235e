"""The jobs of one owned partition: begin a job, publish features and embeddings, and record the outcome in the state.

The features of a job are on their way as soon as it begins, while the encoder works. Its embeddings follow when the
features are acknowledged, so that whoever finds an embedding finds features of its source offset, or newer ones.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import numpy as np

from encoder.arrays import F32
from streams.core.features.partition import FeatureJob
from streams.core.jobs import EncodeJob
from streams.core.policy import Reason
from streams.engine.outputs import Outputs
from streams.engine.ownership import OwnedPartition
from streams.telemetry.metrics import Metrics
from streams.telemetry.times import observe_published
from streams.wire.dead_letters import error_headers
from streams.wire.embeddings import EmbeddingBatch, Message
from streams.wire.features import FeatureBatch

logger = logging.getLogger(__name__)

LABELS = {int(reason): reason.label for reason in Reason}
REVISION_BITS = 32
"""Low bits of a job's revision, which hold the state's own; the partition's incarnation is in the bits above."""
REFRESH = "refresh"
"""Reason of features that are published again without an event."""
PUBLISH_RETRY_MS = 500
"""Delay after which users are due again whose embeddings could not be published."""
SLOW_S = 0.5
"""Time after which the encode queue no longer waits for an acknowledgement."""
PUBLISHING_MAX = 8
"""Unacknowledged jobs of a partition at which no further one is begun."""
REJECT_S = 2.0
"""Time that the dead letters of users that the encoder rejected may take; the next rejection repeats them."""
SHED_RETRY_MS = 1_000
"""Delay after which users are due again for whom the queue had no room."""
REJECTED_RETRY_MAX_MS = 3_600_000
"""Limit of `REJECTED_RETRY_MS`, which doubles with every failure of a user."""
REJECTED_USERS_MAX = 10_000
"""Rejected users whose failures are counted."""
REJECTED_RETRY_MS = 60_000
"""Delay after which a user that the encoder cannot embed is tried again, unless it becomes due for a better reason."""


class PartitionJobs:
    """The jobs of one owned partition; implements `streams.encoding.queue.JobOwner`."""

    def __init__(
        self,
        owned: OwnedPartition,
        outputs: Outputs,
        metrics: Metrics,
        *,
        encoder_version: str,
        incarnation: int,
        now_ms: Callable[[], int],
    ) -> None:
        self._owned, self._outputs, self._metrics = owned, outputs, metrics
        self._incarnation = incarnation
        self._encoder_version, self._now_ms = encoder_version, now_ms
        self._failures: dict[bytes, int] = {}
        """Failures in a row of users that the encoder could not embed, oldest user first."""
        self._publishing: set[asyncio.Task[None]] = set()
        self._features: set[asyncio.Task[bool]] = set()
        """Features that are on their way."""

    def begin_job(self, users: Sequence[bytes]) -> EncodeJob:
        """Begin a job for those of `users` that are still due.

        While the output topic takes no embeddings of this partition, none is computed: the users are due again later.
        The incarnation becomes part of every revision, so that nothing an encoder has cached under another
        incarnation of the partition is used.
        """
        state = self._owned.state
        if self._is_blocked():
            state.requeue(users, self._now_ms(), PUBLISH_RETRY_MS)
            users = ()
        job = state.begin_job(users)
        job.sequences.revisions[:] += self._incarnation << REVISION_BITS
        if state.features is None or not len(job):
            return job
        features = state.feature_job(job.sequences.users, self._now_ms())
        return replace(job, features=self._send(features, [LABELS[reason] for reason in job.reasons.tolist()]))

    def refresh(self, users: Sequence[bytes]) -> None:
        """Publish the features of users again, because a value has changed without an event.

        While others are on their way nothing happens, and neither while events are replayed of which something newer
        is published: the state hands the users over again.
        """
        if self._features or self._owned.is_replaying or self._is_blocked():
            return
        job = self._owned.state.feature_job(users, self._now_ms())
        if len(job):
            self._metrics.features_refreshed.inc(len(job))
            self._send(job, [REFRESH] * len(job))

    def _send(self, job: FeatureJob, reasons: Sequence[str]) -> asyncio.Task[bool]:
        task = asyncio.create_task(self._publish_features(job, reasons))
        self._features.add(task)
        task.add_done_callback(self._features.discard)
        return task

    async def _publish_features(self, job: FeatureJob, reasons: Sequence[str]) -> bool:
        """Publish features; return whether they are acknowledged."""
        if self._owned.is_closed:
            return False
        assert self._owned.state.features is not None
        records = job.records
        batch = FeatureBatch(
            users=job.users,
            values=records.values,
            event_times_ms=job.newest_event_ms,
            source_offsets=job.offsets,
            as_of_ms=job.as_of_ms,
            valid_until_ms=records.valid_until_ms,
            reasons=reasons,
            completeness=records.completeness,
            estimated=records.estimated,
            feature_set=self._owned.state.features.version,
            computed_at_ms=self._now_ms(),
            source_id=self._owned.mark.source_id,
        )
        try:
            end = await self._outputs.publish_features(self._owned.tp.partition, batch)
        except Exception as error:
            logger.warning("the features of %d users could not be published: %r", len(job), error)
            self._metrics.publish_failures.inc(len(job))
            return False
        self._owned.features_offset = max(end, self._owned.features_offset)
        self._owned.state.finish_feature_job(job, self._now_ms())
        self._metrics.features_published.inc(len(job))
        self._metrics.features_incomplete.inc(sum(map(bool, records.completeness)))
        return True

    def _is_blocked(self) -> bool:
        return len(self._publishing) >= PUBLISHING_MAX or self._outputs.is_busy(self._owned.tp.partition)

    async def publish(self, job: EncodeJob, embeddings: F32) -> None:
        """Publish the embeddings that are not outdated; after a failure their users are due again later.

        Returns after `SLOW_S` at the latest, while the job goes on: the encode queue waits for the jobs of all
        partitions, and one that the broker does not acknowledge must not delay the others.
        """
        task = asyncio.create_task(self._publish(job, embeddings))
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)
        done, _ = await asyncio.wait({task}, timeout=SLOW_S)
        for each in done:
            each.result()

    async def _publish(self, job: EncodeJob, embeddings: F32) -> None:
        state = self._owned.state
        has_features = job.features is None or await job.features
        if self._owned.is_closed:  # encoded for an owner of before, which must not publish beside the present one
            return
        if not has_features:
            state.retry_job(job, self._now_ms(), PUBLISH_RETRY_MS)
            return
        rows = state.drop_outdated(job)
        if len(rows) < len(job):
            job, embeddings = job.select(rows), embeddings[rows]
        if not len(job):
            return
        if self._encoder_version and not await self._publish_embeddings(job, embeddings):
            state.retry_job(job, self._now_ms(), PUBLISH_RETRY_MS)
            return
        now_ms = self._now_ms()
        state.finish_job(job.sequences.users, job.offsets, now_ms)
        for user in job.sequences.users if self._failures else ():
            self._failures.pop(user, None)
        observe_published(self._metrics, now_ms, job.newest_event_ms, job.arrival_ms)

    async def _publish_embeddings(self, job: EncodeJob, embeddings: F32) -> bool:
        """Publish embeddings; return whether they are acknowledged."""
        batch = self._batch(job, embeddings)
        try:
            end = await self._outputs.publish(self._owned.tp.partition, batch)
        except Exception as error:
            logger.warning(
                "%d embeddings could not be published: %r; they are encoded again in %d ms",
                len(job),
                error,
                PUBLISH_RETRY_MS,
            )
            self._metrics.publish_failures.inc(len(job))
            return False
        self._owned.output_offset = max(end, self._owned.output_offset)
        self._metrics.embeddings_published.inc(len(job))
        return True

    async def reject(self, job: EncodeJob, detail: str) -> None:
        """Dead-letter users that the encoder cannot embed; their state stays intact, and they are tried again later.

        The delay doubles with every failure of a user.
        """
        tp = self._owned.tp
        self._metrics.unencodable.inc(len(job))
        letters: list[Message] = []
        for user, offset in zip(job.sequences.users, job.offsets.tolist(), strict=True):
            headers = error_headers(
                [], reason="encoder-failed", detail=detail, topic=tp.topic, partition=tp.partition, offset=offset
            )
            letters.append((user, msgspec.json.encode({"user_id": user.decode(errors="replace")}), headers))
        try:
            async with asyncio.timeout(REJECT_S):
                await self._outputs.dead_letters(tp.partition, letters)
        except TimeoutError:
            logger.warning("the dead letters of %d users that the encoder rejected are not acknowledged", len(letters))
        by_delay: dict[int, list[int]] = {}
        for row, user in enumerate(job.sequences.users):
            by_delay.setdefault(self._rejected_delay_ms(user), []).append(row)
        for delay_ms, rows in by_delay.items():
            self._owned.state.retry_job(job.select(np.array(rows)), self._now_ms(), delay_ms)

    async def retry(self, job: EncodeJob) -> None:
        """End the job of users that the encoder did not get to; they are due again later."""
        self._owned.state.retry_job(job, self._now_ms(), PUBLISH_RETRY_MS)

    def _rejected_delay_ms(self, user: bytes) -> int:
        failures = self._failures.pop(user, 0)
        self._failures[user] = min(failures + 1, 16)
        if len(self._failures) > REJECTED_USERS_MAX:
            del self._failures[next(iter(self._failures))]
        return min(REJECTED_RETRY_MS << failures, REJECTED_RETRY_MAX_MS)

    def requeue(self, users: Sequence[bytes]) -> None:
        """Return users that the queue shed to the state, which hands them over again later."""
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
            source_id=self._owned.mark.source_id,
        )
