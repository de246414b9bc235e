"""`python -m infra.field_cases --only 5,17`: play the cases from the field against real workers and a real broker.

One line per case goes to standard error: number, title, outcome, seconds, and the numbers measured. The last line on
standard output is `{"bench":"field-cases",...}`. The exit code is 1 if a case failed.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from infra.field_cases.case import CASES, Case, Result
from infra.field_cases.rows import ROWS
from infra.field_cases.runner import run_cases
from infra.harness.reporting import console, print_result, run_command
from infra.signals import interrupt_on_sigterm


def field_cases(
    only: Annotated[str, typer.Option(help="Numbers of the cases to run, separated by commas. Default: all.")] = "",
    tree: Annotated[Path | None, typer.Option(help="Checkout whose workers and commands are tried.")] = None,
    quick: Annotated[bool, typer.Option(help="Run only the cases that are part of `make test`.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print only the JSON line.")] = False,
) -> None:
    """Do to a running system what people reported about neighbouring systems, and judge what can be seen of it."""
    console.quiet = json
    for library in ("kafka", "aiokafka", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL + 1)
    interrupt_on_sigterm()  # leave no broker and no worker behind
    results = run_cases(chosen(only, quick=quick), tree.resolve() if tree else None, _report)
    failed = [result.case.number for result in results if result.failure]
    summary = {"bench": "field-cases", "cases": len(results), "passed": len(results) - len(failed), "failed": failed}
    print_result(summary)
    if failed:
        raise typer.Exit(1)


def chosen(only: str, *, quick: bool) -> list[Case]:
    """Return the cases to run, in the order of their numbers."""
    numbers = [part.strip() for part in only.split(",") if part.strip()] or [str(number) for number in ROWS]
    unknown = [part for part in numbers if not part.isdigit() or int(part) not in CASES]
    if unknown:
        known = ", ".join(map(str, sorted(CASES)))
        raise typer.BadParameter(f"there is no case {', '.join(unknown)}; choose from {known}")
    cases = [CASES[int(part)] for part in numbers]
    return sorted((case for case in cases if case.is_quick or not quick), key=lambda case: case.number)


def _report(result: Result) -> None:
    numbers = ", ".join(f"{name} {_shown(value)}" for name, value in result.numbers.items())
    word = "FAIL" if result.failure else "pass"
    text = f"{result.case.number:>3}  {word}  {result.seconds:5.1f} s  {result.case.title}: {result.failure or numbers}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _shown(value: float | str) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_command(field_cases)
