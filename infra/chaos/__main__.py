"""`python -m infra.chaos --seed N --minutes M`: real workers on three brokers, or one, under seeded faults, judged.

Progress goes to standard error. The last line on standard output is `{"bench":"chaos",...}`. The exit code is 1 if
there were violations. The run stops at the first round with a violation, unless `--keep-going` is given.
"""

from __future__ import annotations

import logging
from pathlib import Path
from random import SystemRandom
from typing import Annotated

import typer

from infra.chaos import report
from infra.chaos.faults.catalogue import BY_NAME, PAIRED
from infra.chaos.schedule import RESTARTS_PER_HOUR, Outcome, Plan, run_schedule
from infra.harness.reporting import console, print_result, run_command
from infra.signals import interrupt_on_sigterm

VIOLATIONS_SHOWN = 20


def chaos(  # noqa: PLR0913 - one parameter per option
    seed: Annotated[int | None, typer.Option(help="Root seed; drawn at random and printed by default.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Duration; the last round is completed.")] = 10.0,
    faults: Annotated[str, typer.Option(help="Faults to run, separated by commas; a+b is a pair. Default: all.")] = "",
    keep_going: Annotated[bool, typer.Option(help="Continue after a violation.")] = False,
    rate: Annotated[float, typer.Option(min=1, max=5_000, help="Actions per second.")] = 500.0,
    brokers: Annotated[int, typer.Option(help="Number of brokers: 3, or 1.")] = 3,
    features: Annotated[bool, typer.Option(help="Compute features, too.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print only the JSON line.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("reports/chaos"),
) -> None:
    """Break brokers, workers, disks, encoders and input on purpose, and check that every invariant holds."""
    names = tuple(name.strip() for name in faults.split(",") if name.strip())
    _check(names, brokers)
    console.quiet = json
    for library in ("kafka", "aiokafka"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    plan = Plan(
        SystemRandom().randrange(10**6) if seed is None else seed, minutes, names, keep_going, rate, brokers, features
    )
    _progress(f"seed {plan.seed}, {minutes:g} minutes, {brokers} broker(s)")
    interrupt_on_sigterm()  # leave no broker and no disk behind
    outcome = run_schedule(plan, _progress, _report_round)
    report.show(outcome)
    _progress(f"report: {report.write(out, outcome)}")
    print_result(report.summary(outcome))
    if outcome.violations:
        raise typer.Exit(1)


def _check(names: tuple[str, ...], brokers: int) -> None:
    if brokers not in RESTARTS_PER_HOUR:
        raise typer.BadParameter(f"--brokers is {brokers}; it can be 1 or 3")
    for name in names:
        parts = name.split("+")
        unknown = [part for part in parts if part not in BY_NAME]
        if unknown:
            raise typer.BadParameter(f"no fault {unknown[0]!r}; choose from {', '.join(BY_NAME)}")
        needy = [part for part in parts if BY_NAME[part].brokers_min > brokers]
        if needy:
            raise typer.BadParameter(f"{needy[0]} needs {BY_NAME[needy[0]].brokers_min} brokers: add --brokers 3")
        if len(parts) > 1 and frozenset(BY_NAME[part].group for part in parts) not in PAIRED:
            raise typer.BadParameter(f"{name}: these faults cannot strike together")


def _progress(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _report_round(outcome: Outcome) -> None:
    """Print a line about the last round, and its violations."""
    _progress(report.round_line(outcome))
    violations = outcome.rounds[-1].violations
    for violation in violations[:VIOLATIONS_SHOWN]:
        _progress(f"          {violation}")
    if len(violations) > VIOLATIONS_SHOWN:
        _progress(f"          and {len(violations) - VIOLATIONS_SHOWN} more")


if __name__ == "__main__":
    run_command(chaos)
