"""The encode queue: each due user waits in it at most once, and leaves it as a published embedding.

It stands between the event loop, which owns all state, and one encoder thread, which owns the runtime. Users wait by
priority, then in order of arrival; whoever is taken is encoded as of that moment, so a burst of actions costs one
embedding (coalescing). A micro-batch is as large as the encoder can take within `batch_ms`, and the loop stands still
that long for it: two threads that both run Python hand the interpreter's lock to and fro after each of torch's
operations, and then a micro-batch takes four times as long (docs/adr/0008-encoder-before-ingestion.md). A micro-batch
that takes longer continues beside the loop, so that a slow or hung encoder holds up nothing else.

The queue holds no truth. A user stays *due* in its partition's state until an embedding has been acknowledged by the
output topic, so a worker may die, a partition may go or the encoder may fail at any point, and nobody is forgotten.

Limits, all in `EncodeQueuePolicy`: users waiting, users in a micro-batch, unacknowledged micro-batches, attempts.
Ingestion holds back while not `has_room`; what one batch or the timers bring beyond the limit is shed, lowest priority
and newest first: those users stay due in their state, which hands them over again later.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32
from encoder.inference import EncoderRuntime
from streams.core.jobs import EncodeJob, merged
from streams.core.policy import Reason
from streams.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)


FIRST_USERS = 256
"""In a micro-batch, before it is known how long the encoder takes."""


@dataclass(frozen=True, slots=True)
class EncodeQueuePolicy:
    """The named limits of the queue."""

    users_max: int = 100_000
    batch_users_max: int = 4_096
    batch_ms: float = 50.0
    """How long the encoder may take for a micro-batch: its size follows from that, between 1 and `batch_users_max`."""
    wait_ms: float = 0.0
    """How long a micro-batch may gather after its first user; 0 takes whoever is there."""
    publishing_max: int = 8
    """Micro-batches that may be unacknowledged at once."""
    attempts_max: int = 3
    retry_backoff_ms: int = 200
    stuck_after_ms: int = 5_000
    """A micro-batch that the encoder has not finished after this makes the worker unready."""


class EncodeSource(Protocol):
    """What the queue needs of an owned partition."""

    def take(self, users: Sequence[bytes]) -> EncodeJob:
        """Those of `users` that are still due, as of now."""

    async def publish(self, job: EncodeJob, embeddings: F32) -> None:
        """Publish row i of `embeddings` for row i of `job`; returns when that has been settled one way or the other."""

    async def refuse(self, job: EncodeJob, detail: str) -> None:
        """The encoder cannot embed these users as they are: dead-letter them; their state stays intact."""

    def shed(self, users: Sequence[bytes]) -> None:
        """These users had to leave the queue; they stay due and are to be handed over again later."""


Waiting = tuple[EncodeSource, int]
"""Who owns a waiting user, and the `Reason` that made it due."""


class EncodeQueue:
    """One slot per user, micro-batches, one encoder thread."""

    def __init__(self, runtime: EncoderRuntime, policy: EncodeQueuePolicy, metrics: Metrics) -> None:
        self._runtime, self._policy, self._metrics = runtime, policy, metrics
        self._waiting: dict[int, dict[bytes, Waiting]] = {}
        """Priority -> users in order of arrival; a higher priority is taken first."""
        self._priority_of: dict[bytes, int] = {}
        self._filled, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._publishing: set[asyncio.Task[None]] = set()
        self._room = min(FIRST_USERS, policy.batch_users_max)
        """Users that fit a micro-batch."""
        self._works = True
        """False from the first failed attempt until the encoder works again."""
        self._encoding_since_s: float | None = None
        """Monotonic; None while the encoder has nothing to do."""

    def __len__(self) -> int:
        return len(self._priority_of)

    @property
    def is_busy(self) -> bool:
        """Whether anybody waits or is being encoded: `encoded_users` must rise."""
        return bool(self._priority_of) or self._encoding_since_s is not None

    @property
    def healthy(self) -> bool:
        """False while the encoder fails, or has sat on one micro-batch for `stuck_after_ms`: readiness follows it."""
        since_s = self._encoding_since_s
        is_stuck = since_s is not None and (time.monotonic() - since_s) * 1000 >= self._policy.stuck_after_ms
        return self._works and not is_stuck

    def put(
        self, source: EncodeSource, users: Iterable[bytes], priorities: Iterable[int], reasons: Iterable[int]
    ) -> None:
        """Queue users that are due; one that waits already keeps its slot, at the higher of both priorities."""
        for user, priority, reason in zip(users, priorities, reasons, strict=True):
            waits_at = self._priority_of.get(user)
            if waits_at is not None:
                if waits_at >= priority:
                    continue
                del self._waiting[waits_at][user]
            self._priority_of[user] = priority
            self._waiting.setdefault(priority, {})[user] = source, reason
        if len(self) > self._policy.users_max:
            self._shed(len(self) - self._policy.users_max)
        self._update_flag()

    @property
    def has_room(self) -> bool:
        """Whether fewer users wait than the limit; ingestion holds back while not."""
        return len(self) < self._policy.users_max

    def drop(self, source: EncodeSource) -> None:
        """Forget the users of a partition that is given back; they stay due in its state."""
        for users in self._waiting.values():
            for user in [user for user, (owner, _) in users.items() if owner is source]:
                del users[user]
                del self._priority_of[user]
        self._update_flag()

    async def settle(self, timeout_s: float) -> bool:
        """Wait until nothing is being encoded or published; True when that was within the time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
                while self._publishing:
                    await asyncio.wait(self._publishing)
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Encode and publish micro-batches until cancelled."""
        while True:
            await self._filled.wait()
            if self._policy.wait_ms and len(self) < self._room:
                await asyncio.sleep(self._policy.wait_ms / 1000)
            while len(self._publishing) >= self._policy.publishing_max:
                await asyncio.wait(self._publishing, return_when=asyncio.FIRST_COMPLETED)
            self._idle.clear()
            try:
                await self._encode(self._take())
            finally:
                self._idle.set()

    def close(self) -> None:
        """Let the encoder thread end once its current micro-batch is done."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> list[tuple[EncodeSource, EncodeJob]]:
        """The next micro-batch, highest priority first, as one job per partition."""
        by_source: dict[int, tuple[EncodeSource, list[bytes]]] = {}
        room = self._room
        for priority in sorted(self._waiting, reverse=True):
            users = self._waiting[priority]
            for user in list(islice(users, room)):
                source, _ = users.pop(user)
                del self._priority_of[user]
                by_source.setdefault(id(source), (source, []))[1].append(user)
                room -= 1
            if not room:
                break
        self._update_flag()
        jobs = [(source, source.take(users)) for source, users in by_source.values()]
        return [(source, job) for source, job in jobs if len(job)]

    def _update_flag(self) -> None:
        if self._priority_of:
            self._filled.set()
        else:
            self._filled.clear()

    def _shed(self, excess: int) -> None:
        """Take the newest users of the lowest priorities out, and give them back to their sources."""
        by_source: dict[int, tuple[EncodeSource, list[bytes]]] = {}
        for priority in sorted(self._waiting):
            users = self._waiting[priority]
            for user in list(islice(reversed(users), excess)):
                source, reason = users.pop(user)
                del self._priority_of[user]
                by_source.setdefault(id(source), (source, []))[1].append(user)
                self._metrics.shed.inc(reason=Reason(reason).label)
                excess -= 1
            if not excess:
                break
        for source, shed in by_source.values():
            source.shed(shed)

    async def _encode(self, jobs: list[tuple[EncodeSource, EncodeJob]]) -> None:
        """Encode the jobs of all partitions in one call, for a call costs more than the few users of a small batch."""
        if not jobs:
            return
        all_embeddings = await self._embed(merged([job for _, job in jobs]))
        ends = np.cumsum([len(job) for _, job in jobs])
        for (source, job), embeddings in zip(jobs, np.split(all_embeddings, ends[:-1]), strict=True):
            good = np.isfinite(embeddings).all(axis=1)
            if not good.all():
                bad = job.select(np.flatnonzero(~good))
                self._settle_later(source.refuse(bad, "the encoder failed, or returned NaN or infinity"))
                job, embeddings = job.select(np.flatnonzero(good)), embeddings[good]
            if len(job):
                self._settle_later(source.publish(job, embeddings))

    def _settle_later(self, settling: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(settling)
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _embed(self, job: EncodeJob) -> F32:
        """Embed in the encoder thread; a failure is retried, then the users are halved until the bad one is found."""
        for attempt in range(1, self._policy.attempts_max + 1):
            self._encoding_since_s = started_s = time.monotonic()
            try:
                embeddings = await self._embed_first(job.sequences)
            except Exception:
                self._works = False
                self._metrics.encode_failures.inc()
                logger.exception("encoder failed on %d users, attempt %d", len(job), attempt)
                await asyncio.wrap_future(self._thread.submit(self._runtime.clear))
                await asyncio.sleep(self._policy.retry_backoff_ms * attempt / 1000)
            else:
                self._works = True
                seconds = time.monotonic() - started_s
                self._adapt(len(embeddings), seconds * 1000)
                self._count(len(embeddings), seconds)
                return embeddings
            finally:
                self._encoding_since_s = None
        return await self._embed_halves(job)

    async def _embed_first(self, sequences: SequenceBatch) -> F32:
        """Embed in the encoder's thread, which has the interpreter to itself at first."""
        future = self._thread.submit(self._runtime.embed, sequences)
        wait([future], timeout=self._policy.batch_ms / 1000)
        return future.result() if future.done() else await asyncio.wrap_future(future)

    def _adapt(self, users: int, ms: float) -> None:
        """Halve what takes too long, and double what is full and takes less than half of the time."""
        if ms > self._policy.batch_ms:
            self._room = max(1, min(users, self._room) // 2)
        elif users >= self._room and ms < self._policy.batch_ms / 2:
            self._room = min(2 * self._room, self._policy.batch_users_max)

    async def _embed_halves(self, job: EncodeJob) -> F32:
        if len(job) == 1:
            return np.full((1, self._runtime.embedding_dim), np.nan, np.float32)
        halves = np.array_split(np.arange(len(job)), 2)
        return np.concatenate([await self._embed(job.select(rows)) for rows in halves])

    def _count(self, users: int, seconds: float) -> None:
        metrics, runtime = self._metrics, self._runtime
        metrics.encode_batches.inc()
        metrics.encoded_users.inc(users)
        metrics.encode_seconds.observe(seconds)
        metrics.encode_batch_users.observe(users)
        metrics.cache_hits.inc(runtime.extensions - metrics.cache_hits.value())
        metrics.cache_prefills.inc(runtime.prefills - metrics.cache_prefills.value())
