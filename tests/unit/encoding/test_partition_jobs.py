"""The jobs of one owned partition: revisions per incarnation, and users that were shed."""

from __future__ import annotations

from typing import Any

from faust.types import TP

from streams.core.policy import TriggerPolicy
from streams.encoding.partition_jobs import REVISION_BITS, SHED_RETRY_MS, PartitionJobs
from streams.engine.ownership import OwnedPartition
from streams.telemetry.metrics import Metrics
from tests.unit.core.build import batch, state_of

NOW_MS = 1_000_000
NONE: Any = None


def test_a_cache_of_another_incarnation_is_not_used() -> None:
    """Two incarnations of a partition never share a revision, so nothing cached under one is used under the other."""
    state = state_of(TriggerPolicy(), [b"a"])
    owned = OwnedPartition(TP("actions", 0), state, NONE, NONE, 0, 0, 0)

    def revisions(incarnation: int) -> list[int]:
        state.apply(batch([b"a"], [incarnation], offset=incarnation), NOW_MS)
        jobs = PartitionJobs(
            owned, NONE, Metrics(), encoder_version="v", incarnation=incarnation, now_ms=lambda: NOW_MS
        )
        job = jobs.begin_job([b"a"])
        state.finish_job(job.sequences.users, job.offsets, NOW_MS)
        return job.sequences.revisions.tolist()

    one, other = revisions(1), revisions(2)
    assert one != other
    assert [revision % 2**REVISION_BITS for revision in (*one, *other)] == [0, 0]


def test_shed_users_are_handed_over_again_after_the_delay() -> None:
    """A shed user stays due, is handed over again after the delay and not before, and its job is complete."""
    state = state_of(TriggerPolicy(), [b"a", b"b"])
    owned = OwnedPartition(TP("actions", 0), state, NONE, NONE, 0, 0, 0)
    jobs = PartitionJobs(owned, NONE, Metrics(), encoder_version="v", incarnation=1, now_ms=lambda: NOW_MS)
    assert state.apply(batch([b"a", b"b"], [1, 2]), NOW_MS).due == [b"a", b"b"]
    jobs.requeue([b"a"])
    assert state.fire_timers(NOW_MS + SHED_RETRY_MS - 1).due == []
    assert state.fire_timers(NOW_MS + SHED_RETRY_MS).due == [b"a"]
    job = jobs.begin_job([b"a", b"b"])
    assert (job.sequences.users, job.offsets.tolist()) == ([b"a", b"b"], [0, 1])
