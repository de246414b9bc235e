"""The demo from the first step to the last: what is set up, trained, streamed, checked and compared, and taken down.

Everything that is started here ends with the block that started it, whatever happens: the worker, the broker or the
topics on somebody else's broker, and the temporary folder with the state.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoder.data.log import LogColumns, log_from_table
from encoder.release import Release
from encoder.training.recipe import Recipe
from encoder.training.run import Progress, train_release
from infra.datasets.generator import GeneratorPolicy
from infra.demo.live import Screen
from infra.demo.observer import Observer
from infra.demo.readers import Recalls, compare
from infra.demo.recount import Recount, recount
from infra.demo.split import Parts, demo_parts
from infra.demo.stream import Ledger, Streamed, backfill, stream
from infra.demo.worker import free_port, with_values, worker_process
from infra.kafka.broker import ExternalBroker, broker_or_external
from infra.kafka.topics import delete_topics, ensure_topics
from streams.config.settings import Settings, load_settings

WORKER_ID = "demo"


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What may be chosen; the defaults end in under four minutes on two slow cores."""

    recipe: Recipe
    newer_events: int = 120_000
    """At least so many events are replayed."""
    rate: float = 2_500.0
    """Events a second of the replay."""
    train_s: float = 75.0
    generated: GeneratorPolicy | None = None
    """Actions to generate; None takes MovieLens-1M."""
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the demo plays."""

    settings: Settings
    values: dict[str, Any] = field(repr=False)
    """The settings that the demo chose, for the worker's environment."""
    folder: Path

    @property
    def release_dir(self) -> Path:
        return self.folder / "release"

    @property
    def worker_log(self) -> Path:
        return self.folder / "worker.log"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything the report tells."""

    parts: Parts
    release: Release
    streamed: Streamed
    recount: Recount
    recalls: Recalls
    seconds: float
    step_s: dict[str, float]
    """Seconds of each step, in order."""


class Steps:
    """Runs the steps one after another and keeps their seconds."""

    def __init__(self, screen: Screen) -> None:
        self.seconds: dict[str, float] = {}
        self._screen = screen

    @contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        self._screen.line(f"{name}: {text}")
        started_s = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started_s


@contextmanager
def open_stage() -> Iterator[Stage]:
    """A broker with the topics, and a temporary folder; gone at the end of the block."""
    settings = load_settings()
    with tempfile.TemporaryDirectory(prefix="streamformer-demo-") as text, broker_or_external() as broker:
        folder = Path(text)
        values = {
            "kafka.bootstrap_servers": broker.bootstrap_servers,
            "data_dir": folder / "state",
            "encoder.release_dir": folder / "release",
            "worker.instance_id": WORKER_ID,
            "web.port": free_port(),
        }
        is_external = isinstance(broker, ExternalBroker)
        values |= _names_of_our_own() if is_external else {}
        settings = with_values(settings, values)
        try:
            ensure_topics(settings)
            yield Stage(settings, values, folder)
        finally:
            if is_external:
                delete_topics(settings)


def run(stage: Stage, options: DemoOptions, screen: Screen, started_s: float) -> Outcome:
    """All steps; `started_s` is the monotonic clock at the call of the command."""
    steps = Steps(screen)
    with steps.step("actions", "reading the log"):
        parts = demo_parts(options.newer_events, options.generated, seed=options.seed, notice=screen.line)
    ledger = Ledger(parts, stage.settings.topics.partitions)
    with steps.step("backfill", f"{parts.cut:,} events of {parts.origin} go to {stage.settings.topics.actions}"):
        asyncio.run(backfill(parts, stage.settings, ledger))
    with steps.step("training", f"an encoder on the older part, at most {options.train_s:.0f} s"):
        release = train(parts, options, stage.release_dir, screen)
    observer = Observer(stage.settings, parts.log.user_keys)
    newer = len(parts.log) - parts.cut
    with (
        steps.step("streaming", f"one worker; then {newer:,} newer events at {options.rate:,.0f} a second"),
        worker_process(stage.values, stage.settings, stage.worker_log) as worker,
    ):
        streamed = asyncio.run(stream(parts, stage.settings, ledger, observer, worker, options.rate, screen))
    with steps.step("recount", "every history again, from the input topic alone"):
        counted = asyncio.run(recount(stage.settings, parts.log.user_keys, observer, stage.release_dir))
    with steps.step("comparison", "what a fresh, a daily and a once-made embedding would have shown"):
        recalls = compare(parts, release, observer.publications(), streamed.published_before)
    return Outcome(parts, release, streamed, counted, recalls, time.monotonic() - started_s, steps.seconds)


def train(parts: Parts, options: DemoOptions, out_dir: Path, screen: Screen) -> Release:
    """A release trained on the older part with every core, saved to `out_dir`."""

    def show(progress: Progress) -> None:
        metric = "" if progress.metric is None else f", validation {progress.metric:.3f}"
        figures = f"{progress.fraction:.0%}, epoch {progress.epoch}, loss {progress.loss:.3f}{metric}"
        screen.show([("training", figures)])

    log = log_from_table(parts.older.table, LogColumns(timestamp="timestamp_ms"))
    return train_release(log, options.recipe, seconds_max=options.train_s, out_dir=out_dir, progress=show)


def _names_of_our_own() -> dict[str, str]:
    """Names that collide with nothing on a broker that others use."""
    prefix = f"streamformer-demo-{uuid.uuid4().hex[:8]}"
    topics = {
        "topics.actions": "user-actions",
        "topics.embeddings": "user-embeddings",
        "topics.dead_letter": "user-actions.dead-letter",
    }
    return {"app_id": prefix, **{key: f"{prefix}-{name}" for key, name in topics.items()}}
