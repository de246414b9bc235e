"""`streamformer demo`: the whole path in one command."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from encoder.training.recipe import read_recipe
from infra.datasets.generator import GeneratorPolicy
from infra.demo.forever import go_on
from infra.demo.live import Screen
from infra.demo.next_steps import next_steps
from infra.demo.plot import save_plot
from infra.demo.report import TEXT_COLUMNS, as_json, print_report, save_text
from infra.demo.run import DemoOptions, Outcome, deploy, run
from infra.signals import interrupt_on_sigterm

app = typer.Typer()
RECIPE = Path(__file__).parents[2] / "encoder" / "runs" / "demo.toml"
REPORT_DIR, RELEASE_DIR = Path("reports/demo"), Path("releases/demo")
INTERRUPTED = 130


@app.command()
def demo(
    forever: Annotated[
        bool, typer.Option(help="Keep everything up afterwards, with generated actions.", envvar="FOREVER")
    ] = False,
    generated: Annotated[int, typer.Option(min=0, help="Number of generated actions instead of MovieLens-1M.")] = 0,
    rate: Annotated[float, typer.Option(min=1, help="Replayed events per second.")] = 2_500.0,
    newer: Annotated[int, typer.Option(min=1, help="Minimum number of events to replay.")] = 110_000,
    train_seconds: Annotated[float, typer.Option(min=1, help="Maximum training time.")] = 75.0,
    recipe: Annotated[Path, typer.Option(help="Recipe of the training.")] = RECIPE,
    report_dir: Annotated[Path, typer.Option(help="Folder for the text and the plot of the report.")] = REPORT_DIR,
    release_dir: Annotated[Path, typer.Option(help="Folder for the trained release, which is kept.")] = RELEASE_DIR,
) -> None:
    """Run broker, training, worker, replay and a report; it ends by itself, and the last line is JSON."""
    started_s = time.monotonic() - (time.time() - psutil.Process().create_time())  # imports count too
    interrupt_on_sigterm()
    policy = GeneratorPolicy(users=max(20, generated // 150), events=generated) if generated else None
    options = DemoOptions(read_recipe(recipe), newer, rate, train_seconds, policy, release_dir)
    screen = Screen(Console(stderr=True), started_s)
    try:
        with deploy(options) as deployment:
            screen.line(f"Apache Kafka answers at {deployment.settings.kafka.bootstrap_servers}")
            with screen:
                outcome = run(deployment, options, screen, started_s)
            _print(outcome, report_dir, release_dir)
            if forever:
                go_on(deployment, screen)
    except KeyboardInterrupt:
        print("error: interrupted; nothing is left running", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(1 if outcome.recount.faults else 0)


def _print(outcome: Outcome, report_dir: Path, release_dir: Path) -> None:
    """Print the report, save it in the folder, and print the next steps; the last line is JSON."""
    report_dir.mkdir(parents=True, exist_ok=True)
    console = Console()
    print_report(outcome, console if console.is_terminal else Console(width=TEXT_COLUMNS))
    text, picture = save_text(outcome, report_dir / "report.txt"), save_plot(outcome, report_dir / "demo.png")
    print(f"The report is in {text} and {picture}.\n")
    print(next_steps(outcome.split, release_dir))
    print(json.dumps(as_json(outcome)), flush=True)
