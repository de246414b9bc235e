"""The encode queue: coalescing, priority, bounds, and an encoder that fails, hangs or returns NaN."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from encoder.actions.columns import ACTION_DTYPE, SequenceBatch
from encoder.arrays import F32
from streams.core.jobs import EncodeJob, merged
from streams.core.policy import Reason
from streams.encoding.queue import BROKEN_AFTER, PART_FAILURES_MAX, EncodeQueue, EncodeQueuePolicy
from streams.telemetry.metrics import Metrics

WAIT_S = 5.0
HIGH, LOW = 3, 1


class Runtime:
    """Embeds user `b"7"` as [7, 7]; `fail` is called first with the users, in the encoder thread."""

    version, dtype, embedding_dim, sequence_length = "v", "float32", 2, 8

    def __init__(self, fail: Callable[[Sequence[bytes]], None] = lambda users: None) -> None:
        self.calls: list[list[bytes]] = []
        self.extensions = self.prefills = self.cleared = 0
        self.forgotten: list[bytes] = []
        self._fail = fail

    def embed(self, batch: SequenceBatch) -> F32:
        """Return NaN for user 13, and the user's number for all others."""
        self.calls.append(list(batch.users))
        self._fail(batch.users)
        self.extensions += len(batch) - 1
        self.prefills += 1
        values = [float("nan") if user == b"13" else float(user) for user in batch.users]
        return np.repeat(np.array(values, np.float32)[:, None], 2, axis=1)

    def forget(self, users: Sequence[bytes]) -> None:
        """Record the users."""
        self.forgotten += users

    def clear(self) -> None:
        """Count the calls."""
        self.cleared += 1


@dataclass(eq=False)
class Owner:
    """A `JobOwner` whose users are due until published; records the outcome of each."""

    published: dict[bytes, float] = field(default_factory=dict)
    order: list[bytes] = field(default_factory=list)
    rejected: list[bytes] = field(default_factory=list)
    shed: list[bytes] = field(default_factory=list)
    put_off: list[bytes] = field(default_factory=list)
    acknowledged: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.acknowledged.set()

    def begin_job(self, users: Sequence[bytes]) -> EncodeJob:
        """Return a job of all `users`."""
        return job(users)

    async def publish(self, job: EncodeJob, embeddings: F32) -> None:
        """Record the embeddings, after the acknowledgement."""
        await self.acknowledged.wait()
        self.order += job.sequences.users
        self.published |= dict(zip(job.sequences.users, embeddings[:, 0].tolist(), strict=True))

    async def reject(self, job: EncodeJob, detail: str) -> None:
        """Record the users."""
        assert "NaN" in detail
        self.rejected += job.sequences.users

    async def retry(self, job: EncodeJob) -> None:
        """Record the users."""
        self.put_off += job.sequences.users

    def requeue(self, users: Sequence[bytes]) -> None:
        """Record the users."""
        self.shed += users


def job(users: Sequence[bytes]) -> EncodeJob:
    """Return a job in which user n has 1 + n % 3 actions and source offset n."""
    numbers = np.array([int(user) for user in users], np.int64)
    lengths = 1 + numbers % 3
    actions = np.zeros(int(lengths.sum()), ACTION_DTYPE)
    actions["item"] = np.repeat(numbers, lengths)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    sequences = SequenceBatch(list(users), actions, starts, lengths, numbers * 0)
    return EncodeJob(sequences, numbers, numbers + 100, np.full(len(users), Reason.EVERY_N, np.uint8), numbers + 200)


def put(queue: EncodeQueue, owner: Owner, users: Sequence[int], priority: int = LOW) -> None:
    """Queue users by number."""
    names = [b"%d" % user for user in users]
    queue.put(owner, names, [priority] * len(names), [Reason.EVERY_N] * len(names))


@asynccontextmanager
async def running(queue: EncodeQueue) -> AsyncIterator[None]:
    """Run the queue in the background."""
    task = asyncio.create_task(queue.run())
    try:
        yield
    finally:
        task.cancel()
        queue.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, `WAIT_S` at most."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.001)


def test_a_user_has_one_entry_and_several_partitions_share_a_call() -> None:
    """Ten actions of one user cost one embedding, and users of two partitions are encoded in one call."""

    async def scenario() -> None:
        runtime, metrics = Runtime(), Metrics()
        queue, one, two = EncodeQueue(runtime, EncodeQueuePolicy(), metrics), Owner(), Owner()
        for _ in range(10):
            put(queue, one, [1, 2])
        put(queue, two, [5])
        assert len(queue) == 3
        async with running(queue):
            await until(lambda: len(one.published) + len(two.published) == 3)
        assert runtime.calls == [[b"1", b"2", b"5"]]
        assert (one.published, two.published) == ({b"1": 1.0, b"2": 2.0}, {b"5": 5.0})
        assert (metrics.cache_hits.value(), metrics.cache_prefills.value()) == (2, 1)

    asyncio.run(scenario())


def test_the_cache_of_an_expired_user_is_dropped_before_the_next_embedding() -> None:
    """It may begin again under the revision of its old actions, so nothing of them may be left by then."""

    class Ordered(Runtime):
        def forget(self, users: Sequence[bytes]) -> None:
            self.calls.append([b"forget", *users])

    async def scenario() -> None:
        gate = threading.Event()
        runtime, owner = Ordered(lambda users: gate.wait(WAIT_S) and None), Owner()
        queue = EncodeQueue(runtime, EncodeQueuePolicy(batch_ms=1), Metrics())
        async with running(queue):
            put(queue, owner, [1])
            await until(lambda: len(runtime.calls) == 1)
            queue.forget([b"1"])  # while the encoder works on it
            put(queue, owner, [1])
            gate.set()
            await until(lambda: len(runtime.calls) == 3)
        assert runtime.calls == [[b"1"], [b"forget", b"1"], [b"1"]]

    asyncio.run(scenario())


def test_merged_jobs_keep_every_users_rows() -> None:
    """A merged job has, user by user, the rows of the jobs that it was merged from."""
    jobs = [job([b"4", b"2"]), job([b"9"]), job([b"7", b"5", b"6"])]
    whole, row = merged(jobs), 0
    for each in jobs:
        part = whole.select(np.arange(row, row + len(each)))
        row += len(each)
        assert part.sequences.users == each.sequences.users
        for name in ("actions", "starts", "counts", "revisions"):
            np.testing.assert_array_equal(getattr(part.sequences, name), getattr(each.sequences, name))
        for name in ("offsets", "newest_event_ms", "reasons"):
            np.testing.assert_array_equal(getattr(part, name), getattr(each, name))
    assert row == len(whole)


def test_priority_first_then_arrival_in_bounded_batches() -> None:
    """A higher priority goes first, then earlier arrival; queued users can move up; no batch exceeds its limit."""

    async def scenario() -> None:
        runtime, owner = Runtime(), Owner()
        queue = EncodeQueue(runtime, EncodeQueuePolicy(batch_users_max=2), Metrics())
        put(queue, owner, [1, 2, 3])
        put(queue, owner, [4], HIGH)
        put(queue, owner, [3], HIGH)
        put(queue, owner, [4], LOW)
        async with running(queue):
            await until(lambda: len(owner.published) == 4)
        assert runtime.calls == [[b"4", b"3"], [b"1", b"2"]]

    asyncio.run(scenario())


def test_batches_are_as_large_as_their_time_allows() -> None:
    """Batches double up to the limit while full ones are fast, halve while they are slow, and recover."""

    async def scenario() -> None:
        pauses_s = iter([0.0, 0.0, 0.0, 0.25, 0.25, 0.25, 0.0])
        runtime, owner = Runtime(lambda users: time.sleep(next(pauses_s, 0.0))), Owner()
        queue = EncodeQueue(runtime, EncodeQueuePolicy(batch_users_max=600, batch_ms=200.0), Metrics())
        put(queue, owner, range(100, 5_100))
        async with running(queue):
            await until(lambda: len(owner.published) == 5_000)
        assert [len(call) for call in runtime.calls[:8]] == [256, 512, 600, 600, 300, 150, 75, 150]

    asyncio.run(scenario())


def test_a_batch_gathers_users_for_wait_ms() -> None:
    """Users that arrive within `wait_ms` of the first share its batch."""

    async def scenario() -> None:
        runtime, owner = Runtime(), Owner()
        queue = EncodeQueue(runtime, EncodeQueuePolicy(wait_ms=100), Metrics())
        async with running(queue):
            put(queue, owner, [1])
            await asyncio.sleep(0.01)
            put(queue, owner, [2])
            await until(lambda: len(owner.published) == 2)
        assert runtime.calls == [[b"1", b"2"]]

    asyncio.run(scenario())


def test_beyond_the_limit_the_newest_of_the_lowest_priority_are_shed() -> None:
    """At most `users_max` wait; a shed user is returned to its partition, counted, and not encoded."""

    async def scenario() -> None:
        metrics = Metrics()
        queue = EncodeQueue(Runtime(), EncodeQueuePolicy(users_max=4), metrics)
        one, two = Owner(), Owner()
        put(queue, one, [1, 2])
        put(queue, two, [3])
        assert queue.has_room
        put(queue, two, [7, 8, 9], HIGH)
        assert (len(queue), queue.has_room) == (4, False)
        assert (one.shed, two.shed) == ([b"2"], [b"3"])
        assert metrics.shed.value(reason=Reason.EVERY_N.label) == 2
        async with running(queue):
            await until(lambda: len(one.published) + len(two.published) == 4)
        assert two.order == [b"7", b"8", b"9"]
        assert one.order == [b"1"]
        assert queue.has_room

    asyncio.run(scenario())


def test_unacknowledged_batches_are_bounded() -> None:
    """While `publishing_max` batches are unacknowledged, nothing more is encoded, and users stay in the queue."""

    async def scenario() -> None:
        runtime, owner = Runtime(), Owner()
        owner.acknowledged.clear()
        queue = EncodeQueue(runtime, EncodeQueuePolicy(batch_users_max=1, publishing_max=2), Metrics())
        put(queue, owner, [1, 2, 3, 4])
        async with running(queue):
            await until(lambda: len(runtime.calls) == 2)
            await asyncio.sleep(0.05)
            assert (len(runtime.calls), len(queue)) == (2, 2)
            owner.acknowledged.set()
            await until(lambda: len(owner.published) == 4)

    asyncio.run(scenario())


def raises_on(bad: set[bytes]) -> Callable[[Sequence[bytes]], None]:
    """Return a `fail` of `Runtime` that raises on every call with one of these users."""

    def fail(users: Sequence[bytes]) -> None:
        if not bad.isdisjoint(users):
            raise RuntimeError("bad user")

    return fail


def test_only_the_user_that_the_encoder_cannot_embed_pays() -> None:
    """Of 4,096 users one raises: it is found in 13 failed calls without a pause, and no cache is cleared.

    The others are embedded once each. From then on the bad user is tried by itself, in one call.
    """
    runtime, owner, metrics = Runtime(raises_on({b"777"})), Owner(), Metrics()

    async def scenario() -> None:
        queue = EncodeQueue(runtime, EncodeQueuePolicy(retry_backoff_ms=60_000, batch_ms=1_000), metrics)
        queue._batch_users = 4_096
        put(queue, owner, range(1_000, 5_095))
        put(queue, owner, [777])
        async with running(queue):
            await until(lambda: len(owner.published) == 4_095 and owner.rejected == [b"777"])
            assert queue.healthy
            assert metrics.encode_failures.value() == 13
            assert sum(map(len, runtime.calls)) < 3 * 4_096
            runtime.calls.clear()
            put(queue, owner, [1, 777, 2])
            await until(lambda: owner.rejected == [b"777", b"777"] and b"2" in owner.published)
            assert queue.healthy
        assert sorted(runtime.calls) == [[b"1", b"2"], [b"777"]]
        assert (runtime.cleared, owner.put_off) == (0, [])

    asyncio.run(scenario())


def test_a_bad_user_that_comes_alone_costs_the_others_no_cache() -> None:
    """When the only users of a micro-batch raise, what is cached of them is dropped, and of nobody else."""
    runtime, owner = Runtime(raises_on({b"777"})), Owner()

    async def scenario() -> None:
        queue = EncodeQueue(runtime, EncodeQueuePolicy(attempts_max=2, retry_backoff_ms=1), Metrics())
        put(queue, owner, [777])
        async with running(queue):
            await until(lambda: owner.rejected == [b"777"])
        assert (runtime.cleared, runtime.forgotten) == (0, [b"777"])

    asyncio.run(scenario())


def test_a_suspect_that_can_be_embedded_again_is_one_of_the_others() -> None:
    """A user that failed is embedded by itself once more, and then together with the others."""
    bad = {b"6"}
    runtime, owner = Runtime(raises_on(bad)), Owner()

    async def scenario() -> None:
        queue = EncodeQueue(runtime, EncodeQueuePolicy(), Metrics())
        async with running(queue):
            put(queue, owner, [5, 6])
            await until(lambda: owner.rejected == [b"6"])
            bad.clear()
            put(queue, owner, [5, 6])
            await until(lambda: b"6" in owner.published)
            put(queue, owner, [5, 6])
            await until(lambda: runtime.calls[-1] == [b"5", b"6"])

    asyncio.run(scenario())


def test_many_bad_users_in_one_batch_cost_bounded_time() -> None:
    """With 500 bad users of 1,000, a micro-batch makes 256 failed calls at most; those not reached are put off."""
    bad = {b"%d" % user for user in range(1_000, 2_000, 2)}
    runtime, owner, metrics = Runtime(raises_on(bad)), Owner(), Metrics()

    async def scenario() -> None:
        queue = EncodeQueue(runtime, EncodeQueuePolicy(batch_ms=1_000), metrics)
        queue._batch_users = 1_000
        put(queue, owner, range(1_000, 2_000))
        async with running(queue):
            await until(lambda: len(owner.published) + len(owner.rejected) + len(owner.put_off) == 1_000)
        assert metrics.encode_failures.value() == PART_FAILURES_MAX
        assert set(owner.rejected) <= bad
        assert not set(owner.published) & bad
        assert owner.rejected
        assert owner.published

    asyncio.run(scenario())


def test_an_encoder_that_fails_on_everybody_rejects_nobody() -> None:
    """When nothing can be embedded the encoder is at fault: after `attempts_max` attempts all users are put off."""
    runtime, owner, metrics = Runtime(raises_on({b"%d" % user for user in range(300)})), Owner(), Metrics()

    async def scenario() -> None:
        queue = EncodeQueue(runtime, EncodeQueuePolicy(attempts_max=2, retry_backoff_ms=1), metrics)
        put(queue, owner, range(200))
        async with running(queue):
            await until(lambda: len(owner.put_off) == 200)
            assert not queue.healthy
        assert owner.rejected == []
        assert metrics.encode_failures.value() == 2 * BROKEN_AFTER
        assert runtime.cleared == 1

    asyncio.run(scenario())


def test_an_encoder_that_recovers_loses_no_user() -> None:
    """A failed attempt makes the worker unready; a later one encodes the same users, and the worker is ready again."""
    failing = threading.Event()
    failing.set()

    def fail(users: Sequence[bytes]) -> None:
        if failing.is_set():
            raise RuntimeError("failing")

    async def scenario() -> None:
        owner = Owner()
        queue = EncodeQueue(Runtime(fail), EncodeQueuePolicy(attempts_max=1_000, retry_backoff_ms=1), Metrics())
        put(queue, owner, [1, 2])
        assert queue.healthy
        async with running(queue):
            await until(lambda: not queue.healthy)
            failing.clear()
            await until(lambda: len(owner.published) == 2)
        assert queue.healthy
        assert owner.rejected == []

    asyncio.run(scenario())


def test_an_encoder_that_hangs_is_noticed() -> None:
    """While the encoder hangs, the queue is busy, then unhealthy; after it continues, the users are published."""
    go_on = threading.Event()

    async def scenario() -> None:
        owner = Owner()
        queue = EncodeQueue(Runtime(lambda users: bool(go_on.wait(WAIT_S)) and None), POLICY, Metrics())
        put(queue, owner, [1])
        async with running(queue):
            await until(lambda: len(queue) == 0)
            assert queue.is_busy
            await until(lambda: not queue.healthy)
            go_on.set()
            await until(lambda: len(owner.published) == 1)
        assert queue.healthy
        assert not queue.is_busy

    asyncio.run(scenario())


POLICY = EncodeQueuePolicy(stuck_after_ms=30)


def test_nan_is_dead_lettered_and_the_others_are_published() -> None:
    """A user whose embedding is NaN is rejected; the others in its batch, also of other partitions, are not."""

    async def scenario() -> None:
        queue, one, two = EncodeQueue(Runtime(), EncodeQueuePolicy(), Metrics()), Owner(), Owner()
        put(queue, one, [1, 13])
        put(queue, two, [2])
        async with running(queue):
            await until(lambda: bool(one.rejected and one.published and two.published))
        assert one.rejected == [b"13"]
        assert (one.published, two.published, two.rejected) == ({b"1": 1.0}, {b"2": 2.0}, [])

    asyncio.run(scenario())


def test_a_revoked_partition_leaves_the_queue() -> None:
    """`drop` removes the users of one partition and of no other."""
    queue, one, two = EncodeQueue(Runtime(), EncodeQueuePolicy(), Metrics()), Owner(), Owner()
    put(queue, one, [1, 2], HIGH)
    put(queue, two, [3])
    queue.drop(one)
    assert len(queue) == 1
    queue.drop(two)
    assert len(queue) == 0
    assert not queue.is_busy


def test_the_event_loop_continues_while_the_encoder_works() -> None:
    """A micro-batch of 200 ms blocks the loop for less than half of that; 50 ms of blocking are intended."""

    async def scenario() -> None:
        owner = Owner()
        queue = EncodeQueue(Runtime(lambda users: time.sleep(0.2)), EncodeQueuePolicy(), Metrics())
        put(queue, owner, [1])
        longest, last = 0.0, time.monotonic()
        async with running(queue):
            while not owner.published:
                await asyncio.sleep(0.001)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert longest < 0.1

    asyncio.run(scenario())
