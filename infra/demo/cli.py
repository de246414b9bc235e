"""`streamformer demo`: the whole path in one command."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from encoder.training.recipe import read_recipe
from infra.demo.live import Screen
from infra.demo.plot import save_plot
from infra.demo.report import as_json, print_report
from infra.demo.run import DemoOptions, Stage, open_stage, run
from infra.demo.worker import worker_process
from infra.event_log import event_log
from infra.generator import GeneratorPolicy, generate
from infra.replay import Pace, replay

app = typer.Typer()
RECIPE = Path(__file__).parents[2] / "encoder" / "runs" / "demo.toml"
REPORT_DIR = Path("reports/demo")
FOREVER_RATE = 200.0


@app.command()
def demo(
    forever: Annotated[bool, typer.Option(help="Stay up afterwards, with made actions.", envvar="FOREVER")] = False,
    generated: Annotated[int, typer.Option(min=0, help="So many made actions instead of MovieLens-1M.")] = 0,
    rate: Annotated[float, typer.Option(min=1, help="Replayed events a second.")] = 2_500.0,
    newer: Annotated[int, typer.Option(min=1, help="Events to replay, at least.")] = 110_000,
    train_seconds: Annotated[float, typer.Option(min=1, help="Time to train.")] = 75.0,
    report_dir: Annotated[Path, typer.Option(help="Where the picture goes.")] = REPORT_DIR,
) -> None:
    """Broker, training, worker, replay and a report; ends by itself, the last line is JSON."""
    started_s = time.monotonic()
    policy = GeneratorPolicy(users=max(20, generated // 150), events=generated) if generated else None
    options = DemoOptions(read_recipe(RECIPE), newer, rate, train_seconds, policy)
    console = Console(soft_wrap=True)
    try:
        with Screen(Console(stderr=True), started_s) as screen, open_stage() as stage:
            screen.line(f"Apache Kafka answers at {stage.settings.kafka.bootstrap_servers}")
            outcome = run(stage, options, screen, started_s)
            print_report(outcome, console)
            console.print(f"picture: {save_plot(outcome, report_dir / 'demo.png')}", highlight=False)
            print(json.dumps(as_json(outcome)), flush=True)
            if forever:
                _go_on(stage, screen)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(1 if outcome.recount.faults else 0)


def _go_on(stage: Stage, screen: Screen) -> None:
    """Keep a worker busy with made actions until interrupted, and say where to look."""
    bootstrap, web = stage.settings.kafka.bootstrap_servers, stage.settings.web
    screen.line(f"broker   {bootstrap}")
    screen.line(f"metrics  http://{web.host}:{web.port}/metrics")
    screen.line(f"look     .venv/bin/streamformer tail --bootstrap-servers {bootstrap}")
    screen.line("Ctrl-C ends it")
    with worker_process(stage.values, stage.settings, stage.worker_log) as worker:
        seed = 0
        while True:
            seed += 1
            made = event_log(generate(GeneratorPolicy(users=2_000, events=20_000), seed))
            asyncio.run(replay(made, stage.settings, Pace(rate=FOREVER_RATE)))
            worker.require()
