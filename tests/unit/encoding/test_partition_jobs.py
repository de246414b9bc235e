"""The jobs of one owned partition: revisions per incarnation, users that were shed, and a topic that refuses."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from faust.types import TP

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32
from streams.core.policy import TriggerPolicy
from streams.encoding.partition_jobs import PUBLISH_RETRY_MS, REVISION_BITS, SHED_RETRY_MS, PartitionJobs
from streams.encoding.queue import EncodeQueue, EncodeQueuePolicy
from streams.engine.ownership import OwnedPartition
from streams.telemetry.metrics import Metrics
from streams.wire.embeddings import EmbeddingBatch, Message
from tests.unit.core.build import batch, state_of

NOW_MS = 1_000_000
NONE: Any = None


class Outputs:
    """Outputs that publish nothing; `busy` says that the topic takes nothing at present."""

    busy = False

    def is_busy(self, partition: int) -> bool:
        """Return whether embeddings would only wait."""
        return self.busy


def jobs_of(owned: OwnedPartition, incarnation: int = 1) -> tuple[PartitionJobs, Outputs]:
    """Return the jobs of a partition, and the outputs that they publish to."""
    outputs: Any = Outputs()
    jobs = PartitionJobs(owned, outputs, Metrics(), encoder_version="v", incarnation=incarnation, now_ms=lambda: NOW_MS)
    return jobs, outputs


def test_a_cache_of_another_incarnation_is_not_used() -> None:
    """Two incarnations of a partition never share a revision, so nothing cached under one is used under the other."""
    state = state_of(TriggerPolicy(), [b"a"])
    owned = OwnedPartition(TP("actions", 0), state, NONE, NONE, 0, 0, 0)

    def revisions(incarnation: int) -> list[int]:
        state.apply(batch([b"a"], [incarnation], offset=incarnation), NOW_MS)
        jobs, _ = jobs_of(owned, incarnation)
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
    jobs, _ = jobs_of(owned)
    assert state.apply(batch([b"a", b"b"], [1, 2]), NOW_MS).due == [b"a", b"b"]
    jobs.requeue([b"a"])
    assert state.fire_timers(NOW_MS + SHED_RETRY_MS - 1).due == []
    assert state.fire_timers(NOW_MS + SHED_RETRY_MS).due == [b"a"]
    job = jobs.begin_job([b"a", b"b"])
    assert (job.sequences.users, job.offsets.tolist()) == ([b"a", b"b"], [0, 1])


def test_a_closed_partition_publishes_nothing_more() -> None:
    """What was encoded while the partition was lost is dropped: another owner may have published something newer."""
    state = state_of(TriggerPolicy(), [b"a"])
    owned = OwnedPartition(TP("actions", 0), state, NONE, NONE, 0, 0, 0)
    jobs, outputs = jobs_of(owned)
    published: list[EmbeddingBatch] = []

    async def publish(partition: int, embeddings: EmbeddingBatch) -> int:
        published.append(embeddings)
        return len(published)

    outputs.publish = publish  # type: ignore[attr-defined]
    for offset, is_closed in ((0, False), (1, True)):
        state.apply(batch([b"a"], [1 + offset], offset=offset), NOW_MS)
        job, owned.is_closed = jobs.begin_job([b"a"]), is_closed
        asyncio.run(jobs.publish(job, np.zeros((1, 2), np.float32)))
    assert [each.source_offsets.tolist() for each in published] == [[0]]


class Gated:
    """A runtime that embeds nothing before `gate` is set, and records the users of each call."""

    version, dtype, embedding_dim, sequence_length = "v", "float32", 2, 8
    extensions = prefills = 0

    def __init__(self) -> None:
        self.gate, self.calls = threading.Event(), list[list[bytes]]()

    def embed(self, batch: SequenceBatch) -> F32:
        """Wait for the gate."""
        self.calls.append(list(batch.users))
        self.gate.wait(5)
        return np.zeros((len(batch), 2), np.float32)

    def forget(self, users: Sequence[bytes]) -> None:
        """Do nothing."""

    def clear(self) -> None:
        """Do nothing."""


class Accepting:
    """Outputs that acknowledge everything at once."""

    def is_busy(self, partition: int) -> bool:
        """Return that the topic takes embeddings."""
        return False

    async def publish(self, partition: int, batch: EmbeddingBatch) -> int:
        """Return an offset."""
        return 1


def test_a_strong_action_overtakes_users_that_wait_and_sheds_the_lowest_first() -> None:
    """State, queue and jobs together: of many waiting users the one that buys is encoded next, and is not shed."""

    async def scenario() -> list[list[bytes]]:
        users = [b"%d" % index for index in range(8)]
        state = state_of(TriggerPolicy(strong=frozenset({"buy"})), users)
        metrics, runtime = Metrics(), Gated()
        owned = OwnedPartition(TP("actions", 0), state, NONE, NONE, 0, 0, 0)
        outputs: Any = Accepting()
        jobs = PartitionJobs(owned, outputs, metrics, encoder_version="v", incarnation=1, now_ms=lambda: NOW_MS)
        policy = EncodeQueuePolicy(users_max=6, batch_users_max=1, batch_ms=1)
        queue = EncodeQueue(runtime, policy, metrics)

        def act(names: list[bytes], offset: int, action: str) -> None:
            effects = state.apply(batch(names, [1] * len(names), offset=offset, actions=[action] * len(names)), NOW_MS)
            queue.put(jobs, effects.due, effects.priorities.tolist(), effects.reasons.tolist())

        running = asyncio.create_task(queue.run())
        act(users[:1], 0, "see")
        while not runtime.calls:
            await asyncio.sleep(0.001)
        act(users[1:7], 1, "see")  # six users wait
        act(users[6:7], 7, "buy")  # the last of them is promoted
        act(users[7:], 8, "see")  # one more than the limit: the newest of the lowest priority is shed
        assert metrics.promoted.value(reason="strong") == 1
        assert metrics.shed.value(reason="every_n") == 1
        runtime.gate.set()
        while len(queue):
            await asyncio.sleep(0.001)
        running.cancel()
        queue.close()
        return runtime.calls

    calls = asyncio.run(scenario())
    assert calls[:3] == [[b"0"], [b"6"], [b"1"]]
    assert [b"7"] not in calls


class DeadLetters:
    """Outputs that count dead letters."""

    sent = 0

    def is_busy(self, partition: int) -> bool:
        """Return that the topic takes embeddings."""
        return False

    async def dead_letters(self, partition: int, letters: Sequence[Message]) -> None:
        """Count dead letters."""
        self.sent += len(letters)

    async def publish(self, partition: int, batch: EmbeddingBatch) -> int:
        """Return an offset."""
        return 1


def test_a_user_that_keeps_failing_is_tried_less_and_less_often() -> None:
    """The delay after a rejection doubles up to an hour, begins again after a success, and ignores actions."""
    now_ms = NOW_MS
    state, metrics = state_of(TriggerPolicy(), [b"a"]), Metrics()
    owned, outputs = OwnedPartition(TP("actions", 0), state, NONE, NONE, 0, 0, 0), DeadLetters()
    sink: Any = outputs
    jobs = PartitionJobs(owned, sink, metrics, encoder_version="v", incarnation=1, now_ms=lambda: now_ms)

    def delay_s() -> int:
        """Reject the user's job, let it act, and return after how many seconds it is handed over."""
        nonlocal now_ms
        asyncio.run(jobs.reject(jobs.begin_job([b"a"]), "broken"))
        assert state.apply(batch([b"a"], [now_ms], offset=now_ms), now_ms + 1).due == []
        began_ms = now_ms
        while state.fire_timers(now_ms).due != [b"a"]:
            now_ms += 1_000
        return round((now_ms - began_ms) / 1_000)

    assert state.apply(batch([b"a"], [1]), now_ms).due == [b"a"]
    assert [delay_s() for _ in range(8)] == [60, 120, 240, 480, 960, 1_920, 3_600, 3_600]
    assert (metrics.unencodable.value(), outputs.sent) == (8, 8)
    asyncio.run(jobs.publish(jobs.begin_job([b"a"]), np.zeros((1, 2), np.float32)))
    assert state.apply(batch([b"a"], [now_ms], offset=now_ms), now_ms).due == [b"a"]
    assert delay_s() == 60


def test_what_is_published_is_observed() -> None:
    """Of two users one has acted in the future: freshness has both, one of them clamped, and so has latency."""
    state, metrics = state_of(TriggerPolicy(), [b"a", b"b"]), Metrics()
    owned, sink = OwnedPartition(TP("actions", 0), state, NONE, NONE, 0, 0, 0), cast(Any, Accepting())
    jobs = PartitionJobs(owned, sink, metrics, encoder_version="v", incarnation=1, now_ms=lambda: NOW_MS)
    state.apply(batch([b"a", b"b"], [NOW_MS + 300_000, NOW_MS - 50], arrival_ms=[NOW_MS - 30] * 2), NOW_MS)
    asyncio.run(jobs.publish(jobs.begin_job([b"a", b"b"]), np.zeros((2, 2), np.float32)))
    held = [next(iter(each.samples().values())) for each in (metrics.freshness_seconds, metrics.latency_seconds)]
    assert [(int(one.counts.sum()), round(one.total, 3)) for one in held] == [(2, 0.05), (2, 0.06)]
    assert metrics.freshness_clamped.value() == 1


def test_nothing_is_encoded_for_a_topic_that_takes_nothing() -> None:
    """While the outputs of a partition are busy its users get no job; they stay due, and are handed over again."""
    state = state_of(TriggerPolicy(), [b"a"])
    owned = OwnedPartition(TP("actions", 0), state, NONE, NONE, 0, 0, 0)
    jobs, outputs = jobs_of(owned)
    assert state.apply(batch([b"a"], [1]), NOW_MS).due == [b"a"]
    outputs.busy = True
    assert len(jobs.begin_job([b"a"])) == 0
    outputs.busy = False
    assert state.fire_timers(NOW_MS + PUBLISH_RETRY_MS).due == [b"a"]
    assert len(jobs.begin_job([b"a"])) == 1
