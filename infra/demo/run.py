"""The demo from the first step to the last: set up, train, stream, recount, compare, take down.

Everything that is started here ends with the block that started it, also after an error: the worker, the broker (or the
topics on an external broker), and the temporary folder with the state. Only the release stays.
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
from infra.demo.features import feature_values, write_attributes
from infra.demo.live import Screen
from infra.demo.observer import Observer
from infra.demo.readers import Recalls, compare
from infra.demo.recount import Recount, recount
from infra.demo.split import Split, demo_split
from infra.demo.stream import Ledger, Stream, Streamed, backfill
from infra.harness.worker_process import Program, free_port, running, with_values, worker_program
from infra.kafka.broker import ExternalBroker, broker_or_external
from infra.kafka.topics import delete_topics, ensure_topics
from streams.config.settings import Settings, load_settings

WORKER_ID = "demo"


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Choices of the user; with the defaults the demo ends in under four minutes on two slow cores."""

    recipe: Recipe
    newer_events: int = 120_000
    """Minimum number of events to replay."""
    rate: float = 2_500.0
    """Events per second of the replay."""
    train_s: float = 75.0
    generated: GeneratorPolicy | None = None
    """Actions to generate; None takes MovieLens-1M."""
    release_dir: Path = Path("releases/demo")
    """Folder in which the release is kept."""
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Deployment:
    """An application of its own on a broker."""

    settings: Settings
    values: dict[str, Any] = field(repr=False)
    """Settings that the demo chose, for the worker's environment."""
    folder: Path

    def worker(self) -> Program:
        """Return the worker, ready to be started."""
        return worker_program(self.values, self.folder / "worker.log")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that the report shows."""

    split: Split
    release: Release
    streamed: Streamed
    recount: Recount
    recalls: Recalls
    seconds: float
    step_s: dict[str, float]
    """Seconds of each step, in order."""


class Steps:
    """Announces the steps and measures their seconds."""

    def __init__(self, screen: Screen) -> None:
        self.seconds: dict[str, float] = {}
        self._screen = screen

    @contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        """Announce the block as a step and measure it."""
        self._screen.line(f"{name}: {text}")
        started_s = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started_s


@contextmanager
def deploy(options: DemoOptions) -> Iterator[Deployment]:
    """Start a broker, create the topics and a temporary folder; the end of the block removes them."""
    settings = load_settings()
    with tempfile.TemporaryDirectory(prefix="streamformer-demo-") as text, broker_or_external() as broker:
        folder = Path(text)
        values = {
            "kafka.bootstrap_servers": broker.bootstrap_servers,
            "data_dir": folder / "state",
            "encoder.release_dir": options.release_dir.resolve(),
            "worker.instance_id": WORKER_ID,
            "web.port": free_port(),
        }
        values |= feature_values(folder)
        is_external = isinstance(broker, ExternalBroker)
        values |= _unique_names() if is_external else {}
        settings = with_values(settings, values)
        try:
            ensure_topics(settings)
            yield Deployment(settings, values, folder)
        finally:
            if is_external:
                delete_topics(settings)


def run(deployment: Deployment, options: DemoOptions, screen: Screen, started_s: float) -> Outcome:
    """Run all steps; `started_s` is the monotonic clock at the call of the command."""
    steps, settings = Steps(screen), deployment.settings
    with steps.step("actions", "reading the log"):
        split = demo_split(options.newer_events, options.generated, seed=options.seed, notice=screen.line)
    if settings.features.attributes_file:
        write_attributes(split, settings.features.attributes_file)
    ledger = Ledger(split, settings.topics.partitions)
    with steps.step("backfill", f"{split.cut:,} events of {split.origin} go to {settings.topics.actions}"):
        asyncio.run(backfill(split, settings, ledger))
    with steps.step("training", f"an encoder on the older part, at most {options.train_s:.0f} s"):
        release = train(split, options, screen)
    observer = Observer(settings, split.log.user_keys)
    newer = len(split.log) - split.cut
    with (
        steps.step("streaming", f"one worker; then {newer:,} newer events at {options.rate:,.0f} per second"),
        running(deployment.worker()) as worker,
    ):
        streamed = asyncio.run(Stream(split, settings, ledger, observer, worker, screen).run(options.rate))
    with steps.step("recount", "recomputing every history from the input topic alone"):
        counted = asyncio.run(recount(settings, split.log.user_keys, observer, options.release_dir))
    with steps.step("comparison", "Recall@10 of fresh, daily and never updated embeddings"):
        recalls = compare(split, release, observer.publications(), streamed.published_before)
    return Outcome(split, release, streamed, counted, recalls, time.monotonic() - started_s, steps.seconds)


def train(split: Split, options: DemoOptions, screen: Screen) -> Release:
    """Train a release on the older part with every core and save it to `options.release_dir`."""

    def show(progress: Progress) -> None:
        metric = "" if progress.metric is None else f", validation {progress.metric:.3f}"
        figures = f"{progress.fraction:.0%}, epoch {progress.epoch}, loss {progress.loss:.3f}{metric}"
        screen.show([("training", figures)])

    log = log_from_table(split.older.table, LogColumns(timestamp="timestamp_ms"))
    return train_release(log, options.recipe, seconds_max=options.train_s, out_dir=options.release_dir, progress=show)


def _unique_names() -> dict[str, str]:
    """Return names that collide with none on a broker that others use."""
    prefix = f"streamformer-demo-{uuid.uuid4().hex[:8]}"
    topics = {
        "topics.actions": "user-actions",
        "topics.embeddings": "user-embeddings",
        "topics.features": "user-features",
        "topics.dead_letter": "user-actions.dead-letter",
    }
    return {"app_id": prefix, **{key: f"{prefix}-{name}" for key, name in topics.items()}}
