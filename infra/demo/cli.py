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
from infra.demo.plot import save_plot
from infra.demo.report import TEXT_COLUMNS, as_json, print_report, save_text
from infra.demo.run import DemoOptions, Outcome, open_stage, run
from infra.signals import interrupt_on_sigterm

app = typer.Typer()
RECIPE = Path(__file__).parents[2] / "encoder" / "runs" / "demo.toml"
REPORT_DIR = Path("reports/demo")
INTERRUPTED = 130


@app.command()
def demo(
    forever: Annotated[bool, typer.Option(help="Stay up afterwards, with made actions.", envvar="FOREVER")] = False,
    generated: Annotated[int, typer.Option(min=0, help="So many made actions instead of MovieLens-1M.")] = 0,
    rate: Annotated[float, typer.Option(min=1, help="Replayed events a second.")] = 2_500.0,
    newer: Annotated[int, typer.Option(min=1, help="Events to replay, at least.")] = 110_000,
    train_seconds: Annotated[float, typer.Option(min=1, help="Time to train.")] = 75.0,
    recipe: Annotated[Path, typer.Option(help="What to train.")] = RECIPE,
    report_dir: Annotated[Path, typer.Option(help="Where text and picture of the report go.")] = REPORT_DIR,
) -> None:
    """Broker, training, worker, replay and a report; ends by itself, the last line is JSON."""
    started_s = time.monotonic() - (time.time() - psutil.Process().create_time())  # imports count too
    interrupt_on_sigterm()
    policy = GeneratorPolicy(users=max(20, generated // 150), events=generated) if generated else None
    options = DemoOptions(read_recipe(recipe), newer, rate, train_seconds, policy)
    screen = Screen(Console(stderr=True), started_s)
    try:
        with open_stage() as stage:
            screen.line(f"Apache Kafka answers at {stage.settings.kafka.bootstrap_servers}")
            with screen:
                outcome = run(stage, options, screen, started_s)
            _tell(outcome, report_dir)
            if forever:
                go_on(stage, screen)
    except KeyboardInterrupt:
        print("error: interrupted; nothing is left running", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(1 if outcome.recount.faults else 0)


def _tell(outcome: Outcome, report_dir: Path) -> None:
    """The report on standard output and in the folder; the last line is JSON."""
    report_dir.mkdir(parents=True, exist_ok=True)
    console = Console()
    print_report(outcome, console if console.is_terminal else Console(width=TEXT_COLUMNS))
    text, picture = save_text(outcome, report_dir / "report.txt"), save_plot(outcome, report_dir / "demo.png")
    print(f"kept in {text} and {picture}")
    print(json.dumps(as_json(outcome)), flush=True)
