"""The part of the demo in which something flows: backfill, catch-up and replay, with the observer in one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from encoder.arrays import I64
from infra.datasets.event_log import EventLog
from infra.datasets.replay import Acknowledged, Pace, ReplayTotals, replay
from infra.demo.histories import recompute
from infra.demo.live import Meter, Screen
from infra.demo.observer import Observer, Seen, Sent
from infra.demo.split import Parts
from infra.demo.worker import WorkerProcess
from infra.errors import InfraError
from streams.config.settings import Settings

CATCH_UP_S = 180.0
LOOK_EVERY_S = 0.1


class NotCaughtUp(InfraError):
    """The worker runs, but its embeddings do not arrive in time."""


class Ledger:
    """What the demo sends: times by offset, and the offset of each row of the log."""

    def __init__(self, parts: Parts, partitions: int) -> None:
        self.sent = Sent(partitions)
        self._parts = parts
        self._offsets = np.full(len(parts.log), -1, np.int64)

    def noting(self, first_row: int) -> Callable[[Acknowledged], None]:
        """A listener for a replay of the log from `first_row` on."""

        def note(batch: Acknowledged) -> None:
            self.sent.add(batch)
            self._offsets[first_row + batch.rows] = batch.base_offset + np.arange(len(batch.rows))

        return note

    def wanted_offsets(self, rows: int, length_max: int) -> I64:
        """[U] source offset that each user's embedding must have once the log's first `rows` are worked off."""
        log, no_ids = self._parts.log, np.zeros(rows, np.uint64)
        histories = recompute(len(log.user_keys), log.user_index[:rows], log.timestamp_ms[:rows], no_ids, length_max)
        return np.where(histories.last_rows < 0, -1, self._offsets[histories.last_rows])


@dataclass(frozen=True, slots=True)
class Streamed:
    """What was measured while it flowed."""

    published_before: int
    """Embeddings when the replay began."""
    seen: Seen
    """Embeddings since then."""
    freshness_ms: I64
    """Of those."""
    began_at_ms: int
    totals: ReplayTotals
    catch_up_s: float
    reasons: dict[str, int]


async def backfill(parts: Parts, settings: Settings, ledger: Ledger) -> ReplayTotals:
    """Send the older part, flat out."""
    return await replay(parts.older, settings, Pace(), on_acknowledged=ledger.noting(0))


async def stream(
    parts: Parts,
    settings: Settings,
    ledger: Ledger,
    observer: Observer,
    worker: WorkerProcess,
    rate: float,
    screen: Screen,
) -> Streamed:
    """Wait for the backfill's embeddings, replay the newer part, wait for its embeddings, and stop the worker."""
    started_s = time.monotonic()
    async with _running(observer) as require:

        def check() -> None:
            worker.require()
            require()

        wanted = ledger.wanted_offsets(parts.cut, settings.state.sequence_length)
        await _catch_up(wanted, observer, check, worker, screen)
        catch_up_s = time.monotonic() - started_s
        published_before, reasons = len(observer), observer.reasons.copy()
        screen.line(f"caught up: {published_before:,} embeddings for {parts.cut:,} events in {catch_up_s:.1f} s")
        began_at_ms = time.time_ns() // 1_000_000
        totals = await _replay(parts.newer, parts.cut, settings, ledger, observer, rate, check, screen)
        wanted = ledger.wanted_offsets(len(parts.log), settings.state.sequence_length)
        await _catch_up(wanted, observer, check, worker, screen)
        await asyncio.to_thread(worker.stop)
    seen = observer.seen(published_before)
    return Streamed(
        published_before=published_before,
        seen=seen,
        freshness_ms=seen.freshness_ms(ledger.sent),
        began_at_ms=began_at_ms,
        totals=totals,
        catch_up_s=catch_up_s,
        reasons=dict(observer.reasons - reasons),
    )


@asynccontextmanager
async def _running(observer: Observer) -> AsyncIterator[Callable[[], None]]:
    """The observer at work; what is yielded raises what the observer died of."""
    task = asyncio.create_task(observer.run())

    def require() -> None:
        if task.done():
            task.result()

    try:
        yield require
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _catch_up(
    wanted: I64, observer: Observer, check: Callable[[], None], worker: WorkerProcess, screen: Screen
) -> None:
    """Return when the newest embedding of every user u contains the event at source offset `wanted[u]`."""
    users = int((wanted >= 0).sum())
    deadline_s = time.monotonic() + CATCH_UP_S
    while waiting := int((observer.newest_offset != wanted).sum()):
        check()
        if time.monotonic() > deadline_s:
            raise NotCaughtUp(
                "the worker does not catch up",
                f"{waiting:,} of {users:,} users still wait after {CATCH_UP_S:.0f} s; it said: {worker.last_words()}",
                "try it on a machine with less to do",
            )
        screen.show([("catching up", f"{users - waiting:,} of {users:,} users, {len(observer):,} embeddings")])
        await asyncio.sleep(LOOK_EVERY_S)


async def _replay(
    newer: EventLog,
    first_row: int,
    settings: Settings,
    ledger: Ledger,
    observer: Observer,
    rate: float,
    check: Callable[[], None],
    screen: Screen,
) -> ReplayTotals:
    """Replay with live figures."""
    meter = Meter(ledger.sent, observer, len(newer))
    replaying = asyncio.create_task(replay(newer, settings, Pace(rate=rate), on_acknowledged=ledger.noting(first_row)))
    try:
        while not (await asyncio.wait([replaying], timeout=1 / screen.REDRAWS_PER_SECOND))[0]:
            check()
            screen.show(meter.read().rows())
        return replaying.result()
    finally:
        replaying.cancel()
        await asyncio.gather(replaying, return_exceptions=True)
