"""The life of the worker process: it starts, runs until a signal, and stops or aborts.

A worker is crash-only where it matters: whenever continuing would risk an event, `abort` logs one line and ends the
process, and its successor continues from the last checkpoint. SIGTERM drains: work in flight is published, every
partition is checkpointed, and the process ends within `worker.shutdown_timeout_ms`. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from functools import partial
from typing import Any

from streams.app import WorkerApp
from streams.config.settings import Settings
from streams.errors import StopsWorker
from streams.health import Health
from streams.telemetry.log_filter import RepeatFilter
from streams.telemetry.prometheus import HealthServer

logger = logging.getLogger(__name__)

ABORTED = 70
"""Exit code after `abort` (EX_SOFTWARE): the supervisor should start the worker again."""
FORCED = 71
"""Exit code when stopping took longer than allowed, or was forced by a second signal."""
DISPLACED = 78
"""Exit code when another worker has joined under the same `worker.instance_id` (EX_CONFIG). A supervisor should not
start the worker again at once: it would displace the other one in turn."""
GIL_SWITCH_S = 0.0001
"""Python's default of 5 ms is how long the encoder thread would wait for the GIL after each of its torch calls."""
GC_THRESHOLDS = (50_000, 20, 20)
"""Allocations before a collection, and collections before one of the next generation. Python's default of 700 spends a
third of the CPU time of ingestion on records that are never part of a cycle."""


class Worker:
    """A worker process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app = WorkerApp(settings, abort=abort)
        self._health = Health(self._app, end_displaced=partial(abort, code=DISPLACED))
        self._server: HealthServer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def run(self) -> int:
        """Run until a signal; return the exit code."""
        sys.setswitchinterval(GIL_SWITCH_S)
        gc.freeze()  # modules and model are never collected
        gc.set_threshold(*GC_THRESHOLDS)
        return asyncio.run(self._run())

    async def _run(self) -> int:
        stop = asyncio.Event()
        _catch_signals(stop)
        await self._start()
        await stop.wait()
        return await self._stop()

    async def _start(self) -> None:
        await self._app.outputs.start(self._app.largest_records())
        self._server = self._health.serve()
        logger.info("metrics at http://%s:%d/metrics", self._settings.web.host, self._server.port)
        self._spawn(self._app.queue.run(), "encode-queue")
        self._spawn(self._app.ingest.run_timers(), "timers")
        self._spawn(self._health.watch(), "watchdog")
        self._spawn(self._app.topic_watch.run(), "topic-watch")
        self._spawn(self._app.expiry.run(), "expiry")
        self._spawn(self._app.former_stores.run(), "former-stores")
        await self._app.faust.start()

    async def _stop(self) -> int:
        """Drain, checkpoint and leave the group, within bounded time."""
        logger.info("stopping: draining, then one last checkpoint")
        try:
            async with asyncio.timeout(self._settings.worker.shutdown_timeout_ms / 1000):
                await self._app.faust.stop()
                for task in self._tasks:
                    task.cancel()
                await self._app.outputs.stop()
        except TimeoutError:
            logger.critical("stopping took longer than worker.shutdown_timeout_ms: ending at once")
            os._exit(FORCED)
        self._app.queue.close()
        if self._server is not None:
            self._server.close()
        logger.info("stopped")
        return 0

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run `work` beside the app; a worker does not outlive any of its tasks."""

        def on_done(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                if isinstance(task.exception(), StopsWorker):
                    abort(str(task.exception()))
                logger.error("task %s failed", name, exc_info=task.exception())
                abort(f"task {name} failed: {task.exception()!r}")

        task = asyncio.create_task(work, name=name)
        task.add_done_callback(on_done)
        self._tasks.append(task)


def abort(reason: str, code: int = ABORTED) -> None:
    """End the process at once, without another write."""
    logger.critical("stopping: %s", reason)
    logging.shutdown()
    os._exit(code)


def _catch_signals(stop: asyncio.Event) -> None:
    """Set `stop` at the first SIGTERM or SIGINT; end the process at the second."""

    def on_signal() -> None:
        if stop.is_set():
            logger.critical("second signal: ending at once")
            os._exit(FORCED)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)


def log_to_stderr(level: str) -> None:
    """Log lines with time and level; those of the libraries from warnings on, each of them once per second."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for library in ("faust", "aiokafka", "kafka", "mode"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(RepeatFilter(exempt="streams"))
