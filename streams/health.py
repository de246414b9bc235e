"""Health: the watchdog that ends a stuck worker, the gauges, and the answers of `/livez` and `/readyz`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NoReturn

from streams.app import REBALANCE_TIMEOUT_S, WorkerApp, now_ms
from streams.engine.membership import Membership
from streams.telemetry.prometheus import HealthServer
from streams.telemetry.watchdog import Progress, Watchdog

WATCH_EVERY_S = 1.0
UNBOUNDED = 2**62
"""Goal of a job whose end is not known: the watchdog only looks for movement towards it."""


class Health:
    """Watches one worker's parts and serves what it sees."""

    def __init__(self, app: WorkerApp, *, end_displaced: Callable[[str], None]) -> None:
        self._app, self._end_displaced = app, end_displaced
        self._watchdog_timeout_ms = app.settings.worker.watchdog_timeout_ms
        # A request to join is answered once all members have joined, or at the end of the rebalance timeout.
        silence_max_s = self._watchdog_timeout_ms / 1000 + REBALANCE_TIMEOUT_S
        self._membership = Membership(app.settings.worker.instance_id, silence_max_s)
        self._ticked_at = time.monotonic()
        self._unready_after_s = app.settings.output.unready_after_ms / 1000
        self._stalled: str | None = None
        self._stalled_outputs: str | None = None

    def serve(self) -> HealthServer:
        """Start the HTTP server of `/metrics`, `/livez` and `/readyz`; the caller closes it."""
        web = self._app.settings.web
        return HealthServer(self._app.metrics, host=web.host, port=web.port, livez=self.livez, readyz=self.readyz)

    async def watch(self) -> NoReturn:
        """Once per second update the gauges, and abort the worker when Faust has crashed or progress has stalled."""
        app, watchdog = self._app, Watchdog(self._watchdog_timeout_ms)
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            self._ticked_at = time.monotonic()
            self._check_membership()
            if app.faust.crashed:
                app.abort(f"Faust has crashed: {app.faust.crash_reason!r}")
            self._stalled = watchdog.observe(self._progress(), now_ms())
            if self._stalled:
                app.abort(self._stalled)
            self._set_gauges()
            self._stalled_outputs = self._describe_stalled_outputs()

    def _check_membership(self) -> None:
        self._membership.observe(self._app.faust.consumer._thread._consumer)
        if self._membership.displaced:
            self._end_displaced(self._membership.displaced)
        if self._membership.problem:
            self._app.abort(self._membership.problem)

    def livez(self) -> str | None:
        """Return why the worker should be killed, or None; the server calls this from its own threads."""
        silent_s = time.monotonic() - self._ticked_at
        if silent_s > self._watchdog_timeout_ms / 1000:
            return f"the event loop has been blocked for {silent_s:.0f} s"
        return self._membership.problem or self._stalled

    def readyz(self) -> str | None:
        """Return why the worker does not publish every assigned partition, or None."""
        partitions = self._app.partitions
        if not partitions.has_joined:
            return "the worker has not joined its group yet, or is joining it again"
        if halted := partitions.halted.copy():
            return "; ".join(f"partition {number} is halted: {reason}" for number, reason in sorted(halted.items()))
        if self._stalled_outputs:
            return self._stalled_outputs
        restoring = len(partitions.assigned) - len(partitions.ready)
        if restoring:
            return f"{restoring} partitions are being restored"
        return None if self._app.queue.healthy else "the encoder fails or is stuck"

    def _describe_stalled_outputs(self) -> str | None:
        """Return which partitions' outputs or checkpoints the broker has not taken for too long, and why; or None."""
        outputs, now_s, found = self._app.outputs, time.monotonic(), []
        for number, owned in sorted(self._app.partitions.ready.items()):
            seconds = outputs.unacknowledged_s(number)
            if seconds > self._unready_after_s:
                reason = outputs.last_error(number) or "the broker does not answer"
                found.append(f"outputs of partition {number} are not acknowledged for {seconds:.0f} s: {reason}")
            if owned.failing_since is not None and now_s - owned.failing_since > self._unready_after_s:
                found.append(f"checkpoints of partition {number} fail for {now_s - owned.failing_since:.0f} s")
        return "; ".join(found) or None

    def _progress(self) -> dict[str, Progress]:
        goal = UNBOUNDED if self._app.queue.is_busy else 0
        encode_queue = Progress(int(self._app.metrics.encoded_users.value()), goal)
        return {"encode queue": encode_queue, **self._app.partitions.progress()}

    def _set_gauges(self) -> None:
        metrics, partitions = self._app.metrics, self._app.partitions
        ready = partitions.ready
        metrics.keep_partitions(partitions.assigned)
        metrics.queue_users.set(len(self._app.queue))
        metrics.hot_users.set(sum(owned.state.hot_users for owned in ready.values()))
        metrics.hot_limit_users.set(sum(owned.state.limits.hot_users_max for owned in ready.values()))
        metrics.deadline_entries.set(sum(owned.state.deadline_entries for owned in ready.values()))
        halted = partitions.halted
        metrics.partitions.set(len(ready.keys() - halted), state="ready")
        metrics.partitions.set(len(partitions.assigned - ready.keys() - halted.keys()), state="restoring")
        metrics.partitions.set(len(halted), state="halted")
        for number, owned in ready.items():
            metrics.unacknowledged_seconds.set(self._app.outputs.unacknowledged_s(number), partition=number)
            end, high = partitions.ends(owned)
            metrics.open_transaction_records.set(high - end, partition=number)
            metrics.processed_offset.set(owned.next_offset, partition=number)
            metrics.consumer_lag.set(max(0, end - owned.next_offset), partition=number)
