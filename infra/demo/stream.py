"""The part of the demo with traffic: backfill, catch-up and replay, with the observer in the same event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from encoder.arrays import F64, I64
from infra.datasets.event_log import EventLog
from infra.datasets.replay import Acknowledged, Pace, ReplayTotals, replay
from infra.demo.histories import recompute
from infra.demo.live import Meter, Screen
from infra.demo.observer import Observer
from infra.demo.split import Split
from infra.errors import InfraError
from infra.harness.freshness import Embeddings, Sent
from infra.harness.worker_process import Process, stop_seconds
from streams.config.settings import Settings

CATCH_UP_S = 180.0
LOOK_EVERY_S = 0.1


class NotCaughtUp(InfraError):
    """The worker runs, but its embeddings do not arrive in time."""


class Ledger:
    """The events that the demo has sent: when, by offset, and the offset of each row of the log."""

    def __init__(self, split: Split, partitions: int) -> None:
        self.sent = Sent([0] * partitions)
        self._split = split
        self._offsets = np.full(len(split.log), -1, np.int64)

    def listener(self, first_row: int) -> Callable[[Acknowledged], None]:
        """Return a listener for a replay of the log from `first_row` on."""

        def on_acknowledged(batch: Acknowledged) -> None:
            rows = first_row + batch.rows
            self.sent.add(
                batch.partition, batch.base_offset, self._split.log.user_index[rows].tolist(), batch.sent_at_s
            )
            self._offsets[rows] = batch.base_offset + np.arange(len(rows))

        return on_acknowledged

    def wanted_offsets(self, rows: int, length_max: int) -> I64:
        """[U] Return the source offset that each user's embedding must have once the log's first `rows` are applied."""
        log, no_ids = self._split.log, np.zeros(rows, np.uint64)
        histories = recompute(len(log.user_keys), log.user_index[:rows], log.timestamp_ms[:rows], no_ids, length_max)
        return np.where(histories.last_rows < 0, -1, self._offsets[histories.last_rows])


@dataclass(frozen=True, slots=True)
class Streamed:
    """Measurements of catch-up and replay."""

    published_before: int
    """Embeddings when the replay began."""
    embeddings: Embeddings
    """Embeddings since the replay began."""
    freshness_ms: F64
    """[E] freshness of these embeddings; NaN where the event is not known."""
    began_at_s: float
    """Time at which the replay began, in seconds since the epoch."""
    totals: ReplayTotals
    catch_up_s: float
    reasons: dict[str, int]
    """Embeddings of the replay by the trigger that caused them."""


async def backfill(split: Split, settings: Settings, ledger: Ledger) -> ReplayTotals:
    """Send the older part as fast as the broker accepts it."""
    return await replay(split.older, settings, Pace(), on_acknowledged=ledger.listener(0))


@dataclass(frozen=True, slots=True)
class Stream:
    """Everything that takes part while events flow."""

    split: Split
    settings: Settings
    ledger: Ledger
    observer: Observer
    worker: Process
    screen: Screen

    async def run(self, rate: float) -> Streamed:
        """Wait for the backfill's embeddings, replay the newer part, wait for its embeddings, and stop the worker."""
        split, observer, started_s = self.split, self.observer, time.monotonic()
        async with observer.running() as require:

            def check() -> None:
                self.worker.require()
                require()

            await self._catch_up(split.cut, check)
            catch_up_s = time.monotonic() - started_s
            published_before, reasons = len(observer), observer.reasons.copy()
            self.screen.line(
                f"caught up: {published_before:,} embeddings for {split.cut:,} events in {catch_up_s:.1f} s"
            )
            began_at_s = time.time()
            totals = await self._replay(split.newer, split.cut, rate, check)
            await self._catch_up(len(split.log), check)
            await asyncio.to_thread(self.worker.stop_in_order, stop_seconds(self.settings))
        embeddings = observer.received.columns(published_before)
        return Streamed(
            published_before=published_before,
            embeddings=embeddings,
            freshness_ms=embeddings.freshness_ms(self.ledger.sent),
            began_at_s=began_at_s,
            totals=totals,
            catch_up_s=catch_up_s,
            reasons=dict(observer.reasons - reasons),
        )

    async def _catch_up(self, rows: int, check: Callable[[], None]) -> None:
        """Return when the newest embedding of every user contains the user's last event among the first `rows`."""
        wanted = self.ledger.wanted_offsets(rows, self.settings.state.sequence_length)
        users = int((wanted >= 0).sum())
        deadline_s = time.monotonic() + CATCH_UP_S
        while waiting := int((self.observer.newest_offset != wanted).sum()):
            check()
            if time.monotonic() > deadline_s:
                last_line = self.worker.last_line()
                raise NotCaughtUp(
                    "the worker does not catch up",
                    f"{waiting:,} of {users:,} users wait after {CATCH_UP_S:.0f} s; its log ends with: {last_line}",
                    "try it on a less busy machine",
                )
            figures = f"{users - waiting:,} of {users:,} users, {len(self.observer):,} embeddings"
            self.screen.show([("catching up", figures)])
            await asyncio.sleep(LOOK_EVERY_S)

    async def _replay(self, newer: EventLog, first_row: int, rate: float, check: Callable[[], None]) -> ReplayTotals:
        """Replay with live figures."""
        meter = Meter(self.ledger.sent, self.observer, len(newer))
        listener = self.ledger.listener(first_row)
        replaying = asyncio.create_task(replay(newer, self.settings, Pace(rate=rate), on_acknowledged=listener))
        try:
            while not (await asyncio.wait([replaying], timeout=1 / self.screen.REDRAWS_PER_SECOND))[0]:
                check()
                self.screen.show(meter.read().rows())
            return replaying.result()
        finally:
            replaying.cancel()
            await asyncio.gather(replaying, return_exceptions=True)
