"""Report a run: progress lines, a table by fault, the JSON line, and the report as Markdown."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from infra.chaos.round import Round
from infra.chaos.schedule import Outcome
from infra.harness.reporting import machine, print_table

HEADINGS = ("fault", "alone", "paired", "seconds to resume", "p99 freshness ms", "violations")


def round_line(outcome: Outcome) -> str:
    """Return the progress line of the last round."""
    last = outcome.rounds[-1]
    exits = ", ".join(f"{count} x {code}" for code, count in sorted(last.exits.items())) or "none"
    return (
        f"          {last.seconds:.0f} s, resumed in {last.resume_seconds:.1f} s, {last.counts['events']} events "
        f"in all, exits: {exits}; kills {outcome.worker_kills}, broker restarts {outcome.broker_restarts}, "
        f"violations {outcome.violations}"
    )


def rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """Return one row per fault."""
    return [_row(name, [each for each in outcome.rounds if name in each.faults]) for name in sorted(outcome.faults)]


def _row(name: str, rounds: list[Round]) -> tuple[str, ...]:
    alone = sum(len(each.faults) == 1 for each in rounds)
    resumes = sorted(each.resume_seconds for each in rounds)
    ages = np.concatenate([each.freshness_ms for each in rounds])
    return (
        name,
        str(alone),
        str(len(rounds) - alone),
        f"{resumes[len(resumes) // 2]:.1f} (worst {resumes[-1]:.1f})",
        f"{np.quantile(ages, 0.99):,.0f}" if len(ages) else "-",
        str(sum(len(each.violations) for each in rounds)),
    )


def summary(outcome: Outcome) -> dict[str, Any]:
    """Return the JSON line."""
    memory, starts = outcome.memory_mb, sorted(outcome.start_seconds)
    return {
        "bench": "chaos",
        "machine": machine(),
        "seed": outcome.plan.seed,
        "brokers": outcome.plan.brokers,
        "minutes": round(outcome.seconds / 60, 1),
        "episodes": len(outcome.rounds),
        "worker_kills": outcome.worker_kills,
        "broker_restarts": outcome.broker_restarts,
        "faults": dict(sorted(outcome.faults.items())),
        "left_out": list(outcome.left_out),
        "violations": outcome.violations,
        "kinds": dict(sorted(Counter(str(one.kind) for each in outcome.rounds for one in each.violations).items())),
        "explained_outputs": outcome.explained_outputs,
        "worst_resume_seconds": round(outcome.worst_resume_seconds, 1),
        "start_seconds_median": round(starts[len(starts) // 2], 1) if starts else None,
        "freshness_p50_ms_under_faults": round(outcome.freshness_ms(0.5)),
        "freshness_p99_ms_under_faults": round(outcome.freshness_ms(0.99)),
        "freshness_worst_ms": round(outcome.freshness_ms(1.0)),
        "longest_stall_seconds": round(outcome.longest_stall_s, 1),
        "rebalances": outcome.rebalances,
        "memory_mb_first": round(memory[0]) if memory else None,
        "memory_mb_last": round(memory[-1]) if memory else None,
    }


def show(outcome: Outcome) -> None:
    """Print the table by fault."""
    print_table(
        f"chaos, seed {outcome.plan.seed}, {outcome.plan.brokers} broker(s), {outcome.seconds / 60:.0f} minutes",
        HEADINGS,
        rows(outcome),
    )


def write(folder: Path, outcome: Outcome) -> Path:
    """Write the report as Markdown and JSON; return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    result = summary(outcome)
    (folder / "chaos.json").write_text(json.dumps(result, indent=2) + "\n")
    page = folder / "chaos.md"
    page.write_text("\n".join(_page(outcome, result)) + "\n")
    return page


def _page(outcome: Outcome, result: dict[str, Any]) -> list[str]:
    events = outcome.rounds[-1].counts if outcome.rounds else Counter[str]()
    table = ["| " + " | ".join(row) + " |" for row in (HEADINGS, ("---",) * len(HEADINGS), *rows(outcome))]
    violations = [f"- round {each.number}, {each.name}: {one}" for each in outcome.rounds for one in each.violations]
    figures = [
        f"| {name} | {value} |" for name, value in result.items() if name not in ("bench", "faults", "machine", "kinds")
    ]
    return [
        f"# Chaos, seed {outcome.plan.seed}",
        "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {result['machine']['cpu']}, {result['machine']['cores']} cores. "
        f"{events['events']:,} events, {events['users']:,} users, {events['output_records']:,} output records, "
        f"{events['checkpoints']:,} checkpoints, all compared with the model.",
        "",
        *table,
        "",
        "| figure | |",
        "| --- | --- |",
        *figures,
        "",
        "## Violations",
        "",
        *(violations or ["None."]),
    ]
