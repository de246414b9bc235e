"""`python -m infra.chaos --seed N --minutes M`: real workers on a real broker under seeded faults, judged at rest.

Progress on standard error. The last line on standard output is `{"bench":"chaos",...}`; the exit code is 1 when a law
was broken. The run stops at the first round that broke one, unless told to keep going.
"""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from random import SystemRandom
from typing import Annotated

import typer

from infra.chaos import report
from infra.chaos.faults.catalogue import BY_NAME, PAIRED
from infra.chaos.schedule import Outcome, Plan, run_schedule
from infra.harness.reporting import console, print_result, run_command

VIOLATIONS_SHOWN = 20


def chaos(
    seed: Annotated[int | None, typer.Option(help="Root seed; a fresh one is drawn and printed without it.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long; a round begun is ended.")] = 10.0,
    faults: Annotated[str, typer.Option(help="Only these, separated by commas; a+b is a pair.")] = "",
    keep_going: Annotated[bool, typer.Option(help="Do not stop at the first broken law.")] = False,
    rate: Annotated[float, typer.Option(min=1, max=5_000, help="Actions a second.")] = 500.0,
    json: Annotated[bool, typer.Option("--json", help="The JSON line alone.")] = False,
    out: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("reports/chaos"),
) -> None:
    """Break brokers, workers, disks, encoders and input on purpose, and check that every law holds."""
    names = tuple(name.strip() for name in faults.split(",") if name.strip())
    _check(names)
    console.quiet = json
    for library in ("kafka", "aiokafka"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    plan = Plan(SystemRandom().randrange(10**6) if seed is None else seed, minutes, names, keep_going, rate)
    _say(f"seed {plan.seed}, {minutes:g} minutes")
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # leave no broker and no disk behind
    outcome = run_schedule(plan, _say, _tell)
    report.show(outcome)
    _say(f"report: {report.write(out, outcome)}")
    print_result(report.summary(outcome))
    if outcome.violations:
        raise typer.Exit(1)


def _check(names: tuple[str, ...]) -> None:
    for name in names:
        parts = name.split("+")
        unknown = [part for part in parts if part not in BY_NAME]
        if unknown:
            raise typer.BadParameter(f"no fault {unknown[0]!r}; there are {', '.join(BY_NAME)}")
        if len(parts) > 1 and frozenset(BY_NAME[part].group for part in parts) not in PAIRED:
            raise typer.BadParameter(f"{name}: these two cannot strike together")


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _tell(outcome: Outcome) -> None:
    """After each round: a line, and the laws it broke."""
    _say(report.round_line(outcome))
    broken = outcome.rounds[-1].violations
    for violation in broken[:VIOLATIONS_SHOWN]:
        _say(f"          {violation}")
    if len(broken) > VIOLATIONS_SHOWN:
        _say(f"          and {len(broken) - VIOLATIONS_SHOWN} more")


if __name__ == "__main__":
    run_command(chaos)
