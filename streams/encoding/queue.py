"""The encode queue: due users wait here, at most one entry each, until an encoder embeds them in micro-batches.

The queue connects the event loop, which owns all state, with one encoder thread, which owns the runtime. Users are
taken by priority, then in order of arrival. A user is encoded as of the moment it is taken, so a burst of its actions
costs one embedding (coalescing). The size of a micro-batch adapts so that the encoder finishes within `batch_ms`.

The queue holds no durable state. A user stays *due* in its partition's state until the output topic has acknowledged
an embedding, so no due user is lost when the worker dies, the partition is revoked or the encoder fails.

All limits are in `EncodeQueuePolicy`: users waiting, users in a micro-batch, unacknowledged micro-batches, attempts.
Ingestion pauses while `has_room` is false. Users that a batch or the timers add beyond the limit are shed, lowest
priority and newest first; they stay due in their state, which hands them over again later.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32, I64, Bool
from encoder.inference import EncoderRuntime
from streams.core.jobs import EncodeJob, merged
from streams.core.policy import Reason
from streams.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)


FIRST_USERS = 256
"""Size of the first micro-batch, before any has been timed."""
BROKEN_AFTER = 32
"""Failed calls of one micro-batch, without a success, after which the encoder counts as broken. One bad user among a
million is found within 20."""
PART_FAILURES_MAX = 256
"""Failed calls of one micro-batch after which the users not yet embedded are put off, so that time is bounded."""
SUSPECTS_AT_ONCE = 8
"""Users that count as the cause, and not the encoder, when nothing of a micro-batch can be embedded."""
SUSPECTS_MAX = 10_000
"""Users on whom the encoder failed that are remembered."""
NO_ROWS = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class EncodeQueuePolicy:
    """The limits of the queue."""

    users_max: int = 100_000
    """Users that may wait."""
    batch_users_max: int = 4_096
    """Users in a micro-batch."""
    batch_ms: float = 50.0
    """Time that a micro-batch should take; its size follows from that, between 1 and `batch_users_max` users."""
    wait_ms: float = 0.0
    """Time for which a micro-batch gathers users after the first; 0 takes only those that already wait."""
    publishing_max: int = 8
    """Micro-batches that may be unacknowledged at once."""
    attempts_max: int = 3
    """Attempts to encode a micro-batch of which nothing can be encoded."""
    retry_backoff_ms: int = 200
    """Pause after the first failed attempt; it grows linearly."""
    stuck_after_ms: int = 5_000
    """Time after which an unfinished micro-batch makes the worker unready."""


class JobOwner(Protocol):
    """An owned partition, as the queue sees it; a job that it begins ends in `publish`, `reject` or `retry`."""

    def begin_job(self, users: Sequence[bytes]) -> EncodeJob:
        """Begin a job for those of `users` that are still due, with their sequences as of now."""

    async def publish(self, job: EncodeJob, embeddings: F32) -> None:
        """Publish row i of `embeddings` for row i of `job`; return once the job has ended, published or failed."""

    async def reject(self, job: EncodeJob, detail: str) -> None:
        """Dead-letter users that the encoder cannot embed; their state stays intact."""

    async def retry(self, job: EncodeJob) -> None:
        """End the job of users that the encoder did not get to; they are due again later."""

    def requeue(self, users: Sequence[bytes]) -> None:
        """Keep users that the queue shed due, and hand them over again later."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """What became of the users of a micro-batch."""

    rows: F32
    """[U, E]; NaN for a user that is not embedded."""
    put_off: Bool
    """[U], whether the user was not embedded through no fault of its own."""

    @classmethod
    def nothing(cls, users: int, dim: int) -> Embedded:
        """Return the outcome before the first call."""
        return cls(np.full((users, dim), np.nan, np.float32), np.zeros(users, np.bool_))


Entry = tuple[JobOwner, int]
"""A waiting user's partition, and the `Reason` for which the user is due."""
PartitionJob = tuple[JobOwner, EncodeJob]
"""A job of a micro-batch, and the partition that it belongs to."""


class EncodeQueue:
    """Due users of all partitions, at most one entry each; takes them in micro-batches to one encoder thread."""

    def __init__(
        self, runtime: EncoderRuntime, policy: EncodeQueuePolicy, metrics: Metrics, thread: Executor | None = None
    ) -> None:
        self._runtime, self._policy, self._metrics = runtime, policy, metrics
        self._waiting: dict[int, dict[bytes, Entry]] = {}
        """Users in order of arrival, by priority; a higher priority is taken first."""
        self._priority_of: dict[bytes, int] = {}
        self._filled, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._publishing: set[asyncio.Task[None]] = set()
        self._batch_users = min(FIRST_USERS, policy.batch_users_max)
        """Users in the next micro-batch, at most; see `_adapt`."""
        self._suspects: dict[bytes, None] = {}
        """Users on whom the encoder failed, oldest first; each is embedded by itself."""
        self._works = True
        """False from a failed attempt until the next successful one."""
        self._encoding_since_s: float | None = None
        """Monotonic time at which the current attempt began; None while the encoder is idle."""

    def __len__(self) -> int:
        return len(self._priority_of)

    @property
    def is_busy(self) -> bool:
        """True while a user waits or is being encoded, so that `encoded_users` must rise."""
        return bool(self._priority_of) or self._encoding_since_s is not None

    @property
    def healthy(self) -> bool:
        """False while the encoder fails or is stuck for `stuck_after_ms`; the worker is then unready."""
        since_s = self._encoding_since_s
        is_stuck = since_s is not None and (time.monotonic() - since_s) * 1000 >= self._policy.stuck_after_ms
        return self._works and not is_stuck

    def put(self, owner: JobOwner, users: Iterable[bytes], priorities: Iterable[int], reasons: Iterable[int]) -> None:
        """Queue users that are due; a user that already waits keeps its entry unless the new priority is higher."""
        for user, priority, reason in zip(users, priorities, reasons, strict=True):
            waits_at = self._priority_of.get(user)
            if waits_at is not None:
                if waits_at >= priority:
                    continue
                del self._waiting[waits_at][user]
                self._metrics.promoted.inc(reason=Reason(reason).label)
            self._priority_of[user] = priority
            self._waiting.setdefault(priority, {})[user] = owner, reason
        if len(self) > self._policy.users_max:
            self._shed(len(self) - self._policy.users_max)
        self._update_flag()

    @property
    def has_room(self) -> bool:
        """True while fewer users wait than the limit allows; ingestion pauses otherwise."""
        return len(self) < self._policy.users_max

    def drop(self, owner: JobOwner) -> None:
        """Remove the users of a revoked partition; they stay due in its state."""
        for users in self._waiting.values():
            for user in [user for user, (of_user, _) in users.items() if of_user is owner]:
                del users[user]
                del self._priority_of[user]
        self._update_flag()

    def forget(self, users: Sequence[bytes]) -> None:
        """Drop what the encoder has cached of these users, before it embeds anything else."""
        self._thread.submit(self._runtime.forget, list(users))  # one thread: in order with `embed`

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is being encoded or published; return whether that happened within the time."""
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
            if self._policy.wait_ms and len(self) < self._batch_users:
                await asyncio.sleep(self._policy.wait_ms / 1000)
            while len(self._publishing) >= self._policy.publishing_max:
                await asyncio.wait(self._publishing, return_when=asyncio.FIRST_COMPLETED)
            self._idle.clear()
            try:
                await self._encode(self._begin_jobs())
            finally:
                self._idle.set()

    def close(self) -> None:
        """Let the encoder thread end after its current micro-batch."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin_jobs(self) -> list[PartitionJob]:
        """Take the next micro-batch, highest priority first; return one job per partition."""
        by_owner: dict[int, tuple[JobOwner, list[bytes]]] = {}
        room = self._batch_users
        for priority in sorted(self._waiting, reverse=True):
            users = self._waiting[priority]
            for user in list(islice(users, room)):
                owner, _ = users.pop(user)
                del self._priority_of[user]
                by_owner.setdefault(id(owner), (owner, []))[1].append(user)
                room -= 1
            if not room:
                break
        self._update_flag()
        jobs = [(owner, owner.begin_job(users)) for owner, users in by_owner.values()]
        return [(owner, job) for owner, job in jobs if len(job)]

    def _update_flag(self) -> None:
        if self._priority_of:
            self._filled.set()
        else:
            self._filled.clear()

    def _shed(self, excess: int) -> None:
        """Remove the newest users of the lowest priorities, and return them to their partitions."""
        by_owner: dict[int, tuple[JobOwner, list[bytes]]] = {}
        for priority in sorted(self._waiting):
            users = self._waiting[priority]
            for user in list(islice(reversed(users), excess)):
                owner, reason = users.pop(user)
                del self._priority_of[user]
                by_owner.setdefault(id(owner), (owner, []))[1].append(user)
                self._metrics.shed.inc(reason=Reason(reason).label)
                excess -= 1
            if not excess:
                break
        for owner, shed in by_owner.values():
            owner.requeue(shed)

    async def _encode(self, jobs: list[PartitionJob]) -> None:
        """Encode the jobs of all partitions in one call, because a call costs more than the users of a small batch."""
        if not jobs:
            return
        embedded = await self._embed(merged([job for _, job in jobs]))
        ends = np.cumsum([len(job) for _, job in jobs])[:-1]
        for (owner, job), rows, is_open in zip(
            jobs, np.split(embedded.rows, ends), np.split(embedded.put_off, ends), strict=True
        ):
            good = np.isfinite(rows).all(axis=1)
            if not good.all():
                bad, later = np.flatnonzero(~good & ~is_open), np.flatnonzero(is_open)
                if len(bad):
                    self._finish_later(owner.reject(job.select(bad), "the encoder failed, or returned NaN or infinity"))
                if len(later):
                    self._finish_later(owner.retry(job.select(later)))
                job, rows = job.select(np.flatnonzero(good)), rows[good]
            if len(job):
                self._finish_later(owner.publish(job, rows))

    def _finish_later(self, finishing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(finishing)
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _embed(self, job: EncodeJob) -> Embedded:
        """Embed in the encoder thread, and find the users that the encoder cannot embed, so that only they pay.

        Users on whom the encoder failed before are embedded one by one, after all others.
        """
        embedded = Embedded.nothing(len(job), self._runtime.embedding_dim)
        suspects = self._suspects
        is_suspect = [user in suspects for user in job.sequences.users] if suspects else [False] * len(job)
        rows = np.flatnonzero(~np.array(is_suspect, np.bool_))
        for attempt in range(1, self._policy.attempts_max + 1):
            rows = await self._embed_all_but_failing(job, rows, embedded)
            if not len(rows) or attempt == self._policy.attempts_max:
                break
            await asyncio.wrap_future(self._thread.submit(self._drop_cached, job, rows))
            await asyncio.sleep(self._policy.retry_backoff_ms * attempt / 1000)
        if len(rows) <= SUSPECTS_AT_ONCE:
            self._suspect(job, rows.tolist())
        else:
            embedded.put_off[rows] = True
        for row in np.flatnonzero(is_suspect):
            await self._try(job, np.array([row]), embedded)
        return embedded

    def _drop_cached(self, job: EncodeJob, rows: I64) -> None:
        """Drop what is cached of the failing rows before they are tried again; of everybody, if they are many."""
        if len(rows) <= SUSPECTS_AT_ONCE:
            self._runtime.forget([job.sequences.users[row] for row in rows.tolist()])
        else:
            self._runtime.clear()

    async def _embed_all_but_failing(self, job: EncodeJob, rows: I64, embedded: Embedded) -> I64:
        """Embed `rows` of the job; halve a part that fails until the users that cause it are found.

        Return no row if the encoder works: the users found are suspects. Return the rows that are not embedded if the
        encoder seems to fail by itself, because nothing could be embedded or too many parts failed.
        """
        parts, alone = [rows] if len(rows) else [], list[int]()
        failures, works = 0, False
        while parts:
            part = parts.pop()
            if await self._try(job, part, embedded):
                works = True
                continue
            failures += 1
            if len(part) == 1:
                alone.append(int(part[0]))
            else:
                parts += np.array_split(part, 2)[::-1]
            if failures >= (PART_FAILURES_MAX if works else BROKEN_AFTER):
                break
        self._works = works or not failures
        if works:
            self._suspect(job, alone)
            embedded.put_off[np.concatenate([NO_ROWS, *parts])] = True  # the rest, after too many failures
            return NO_ROWS
        return np.concatenate([NO_ROWS, np.array(alone, np.int64), *parts])

    async def _try(self, job: EncodeJob, rows: I64, embedded: Embedded) -> bool:
        """Embed some users of the job in one call; return whether the encoder could."""
        part = job if len(rows) == len(job) else job.select(rows)
        self._encoding_since_s = started_s = time.monotonic()
        try:
            embedded.rows[rows] = await self._embed_blocking_first(part.sequences)
        except Exception as error:
            self._metrics.encode_failures.inc()
            logger.warning("the encoder failed on %d users: %r", len(part), error, exc_info=self._works)
            if len(part) > 1 or part.sequences.users[0] not in self._suspects:
                self._works = False
            return False
        finally:
            self._encoding_since_s = None
        seconds = time.monotonic() - started_s
        self._works = True
        self._adapt(len(part), seconds * 1000)
        self._count(len(part), seconds)
        if self._suspects and len(part) == 1:
            self._suspects.pop(part.sequences.users[0], None)
        return True

    def _suspect(self, job: EncodeJob, rows: list[int]) -> None:
        """Embed each of these users by itself from now on, until that succeeds."""
        for row in rows:
            self._suspects[job.sequences.users[row]] = None
            if len(self._suspects) > SUSPECTS_MAX:
                del self._suspects[next(iter(self._suspects))]

    async def _embed_blocking_first(self, sequences: SequenceBatch) -> F32:
        """Embed in the encoder thread; block the event loop for up to `batch_ms`, then wait without blocking."""
        future = self._thread.submit(self._runtime.embed, sequences)
        # This looks wrong, and is intended: `wait` blocks the event loop. If the loop ran Python at the same time, the
        # two threads would pass the interpreter's lock back and forth after each of torch's operations, and a
        # micro-batch would take four times as long (docs/adr/0008-encoder-before-ingestion.md). A slow or hung encoder
        # blocks the loop for `batch_ms` only.
        wait([future], timeout=self._policy.batch_ms / 1000)
        return future.result() if future.done() else await asyncio.wrap_future(future)

    def _adapt(self, users: int, ms: float) -> None:
        """Halve the size when a micro-batch took longer than `batch_ms`; double it when a full one took under half."""
        if ms > self._policy.batch_ms:
            self._batch_users = max(1, min(users, self._batch_users) // 2)
        elif users >= self._batch_users and ms < self._policy.batch_ms / 2:
            self._batch_users = min(2 * self._batch_users, self._policy.batch_users_max)

    def _count(self, users: int, seconds: float) -> None:
        metrics, runtime = self._metrics, self._runtime
        metrics.encode_batches.inc()
        metrics.encoded_users.inc(users)
        metrics.encode_seconds.observe(seconds)
        metrics.encode_batch_users.observe(users)
        metrics.cache_hits.inc(runtime.extensions - metrics.cache_hits.value())
        metrics.cache_prefills.inc(runtime.prefills - metrics.cache_prefills.value())
