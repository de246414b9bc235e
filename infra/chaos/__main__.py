"""`python -m infra.chaos --seed N --minutes M`: real workers on a real broker under seeded faults, judged at rest.

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
from infra.chaos.schedule import Outcome, Plan, run_schedule
from infra.harness.reporting import console, print_result, run_command
from infra.signals import interrupt_on_sigterm

VIOLATIONS_SHOWN = 20


def chaos(
    seed: Annotated[int | None, typer.Option(help="Root seed; drawn at random and printed by default.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Duration; the last round is completed.")] = 10.0,
    faults: Annotated[str, typer.Option(help="Faults to run, separated by commas; a+b is a pair. Default: all.")] = "",
    keep_going: Annotated[bool, typer.Option(help="Continue after a violation.")] = False,
    rate: Annotated[float, typer.Option(min=1, max=5_000, help="Actions per second.")] = 500.0,
    json: Annotated[bool, typer.Option("--json", help="Print only the JSON line.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("reports/chaos"),
) -> None:
    """Break brokers, workers, disks, encoders and input on purpose, and check that every invariant holds."""
    names = tuple(name.strip() for name in faults.split(",") if name.strip())
    _check(names)
    console.quiet = json
    for library in ("kafka", "aiokafka"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    plan = Plan(SystemRandom().randrange(10**6) if seed is None else seed, minutes, names, keep_going, rate)
    _progress(f"seed {plan.seed}, {minutes:g} minutes")
    interrupt_on_sigterm()  # leave no broker and no disk behind
    outcome = run_schedule(plan, _progress, _report_round)
    report.show(outcome)
    _progress(f"report: {report.write(out, outcome)}")
    print_result(report.summary(outcome))
    if outcome.violations:
        raise typer.Exit(1)


def _check(names: tuple[str, ...]) -> None:
    for name in names:
        parts = name.split("+")
        unknown = [part for part in parts if part not in BY_NAME]
        if unknown:
            raise typer.BadParameter(f"no fault {unknown[0]!r}; choose from {', '.join(BY_NAME)}")
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
