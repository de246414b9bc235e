"""Features of a job: published before its embeddings, and not at all while events are replayed."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from faust.types import TP

from streams.core.features.definitions import parse_features
from streams.core.features.partition import FeatureConfig, RefreshPolicy
from streams.core.layout import nothing_stored
from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.encoding.partition_jobs import PUBLISH_RETRY_MS, PartitionJobs
from streams.engine.ownership import OwnedPartition
from streams.telemetry.metrics import Metrics
from streams.wire.embeddings import EmbeddingBatch
from streams.wire.features import FeatureBatch
from tests.unit.core.build import LIMITS, batch
from tests.unit.core.features.histories import ATTRIBUTES, FUNCTIONS

NOW_MS = 20_000 * 86_400_000
NONE: Any = None
FEATURES = parse_features('[[feature]]\nname = "events"\nkind = "count"\nwindow = "1h"\n')


class Outputs:
    """Outputs that keep what is published, in order; features wait until `gate` is set, and may fail."""

    def __init__(self) -> None:
        self.published: list[tuple[str, list[int]]] = []
        self.gate = asyncio.Event()
        self.fails = False

    def is_busy(self, partition: int) -> bool:
        """Return that the topics take records."""
        return False

    async def publish(self, partition: int, embeddings: EmbeddingBatch) -> int:
        """Keep the source offsets of embeddings."""
        self.published.append(("embeddings", embeddings.source_offsets.tolist()))
        return len(self.published)

    async def publish_features(self, partition: int, features: FeatureBatch) -> int:
        """Keep the source offsets of features once the gate is open."""
        await self.gate.wait()
        if self.fails:
            raise OSError("no broker")
        self.published.append(("features", features.source_offsets.tolist()))
        return len(self.published)


def partition_of(outputs: Outputs, encoder_version: str = "v") -> tuple[OwnedPartition, PartitionJobs]:
    """Return a partition with one user who has acted at source offset 0."""
    config = FeatureConfig(FEATURES, ATTRIBUTES, FUNCTIONS, RefreshPolicy(enabled=True, every_min_ms=1))
    state = PartitionState(TriggerPolicy(), LIMITS, config)
    state.load([b"a"], nothing_stored(1, LIMITS))
    assert state.apply(batch([b"a"], [NOW_MS - 1]), NOW_MS).due == [b"a"]
    owned = OwnedPartition(TP("actions", 0), state, NONE, NONE, 1, 0, 0)
    sink: Any = outputs
    jobs = PartitionJobs(owned, sink, Metrics(), encoder_version=encoder_version, incarnation=1, now_ms=lambda: NOW_MS)
    return owned, jobs


@pytest.mark.parametrize("encoder_version", ["v", ""])
def test_embeddings_follow_the_features_of_their_job(encoder_version: str) -> None:
    """They wait for the acknowledgement; a worker without an encoder publishes features only."""

    async def scenario() -> list[tuple[str, list[int]]]:
        outputs = Outputs()
        owned, jobs = partition_of(outputs, encoder_version)
        publishing = asyncio.create_task(jobs.publish(jobs.begin_job([b"a"]), np.zeros((1, 2), np.float32)))
        await asyncio.sleep(0.02)
        assert outputs.published == []
        outputs.gate.set()
        await publishing
        assert owned.state.begin_checkpoint().headers["reason"].tolist() == [0]
        return outputs.published

    embeddings = [("embeddings", [0])] if encoder_version else []
    assert asyncio.run(scenario()) == [("features", [0]), *embeddings]


def test_without_acknowledged_features_no_embedding_is_published() -> None:
    """The user stays due, and both are published again after the delay."""

    async def scenario() -> None:
        outputs = Outputs()
        outputs.fails = True
        outputs.gate.set()
        owned, jobs = partition_of(outputs)
        await jobs.publish(jobs.begin_job([b"a"]), np.zeros((1, 2), np.float32))
        assert outputs.published == []
        assert owned.state.fire_timers(NOW_MS + PUBLISH_RETRY_MS).due == [b"a"]
        outputs.fails = False
        await jobs.publish(jobs.begin_job([b"a"]), np.zeros((1, 2), np.float32))
        assert outputs.published == [("features", [0]), ("embeddings", [0])]

    asyncio.run(scenario())


def test_nothing_is_refreshed_while_something_newer_may_be_published() -> None:
    """After a crash the state is behind the topics until everything up to their newest source offset is replayed."""

    async def scenario() -> None:
        outputs = Outputs()
        outputs.gate.set()
        owned, jobs = partition_of(outputs)
        owned.replayed_at = 2
        jobs.refresh([b"a"])
        await asyncio.sleep(0.01)
        assert outputs.published == []
        owned.next_offset = 2
        jobs.refresh([b"a"])
        await asyncio.sleep(0.01)
        assert outputs.published == [("features", [0])]

    asyncio.run(scenario())


def test_a_closed_partition_publishes_no_features() -> None:
    """Another owner may have published something newer."""

    async def scenario() -> None:
        outputs = Outputs()
        outputs.gate.set()
        owned, jobs = partition_of(outputs)
        job = jobs.begin_job([b"a"])
        owned.is_closed = True
        await jobs.publish(job, np.zeros((1, 2), np.float32))
        assert outputs.published == []

    asyncio.run(scenario())
