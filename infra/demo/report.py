"""What the demo found, as text for people and as one JSON object for scripts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from infra.demo.readers import GROUPS
from infra.demo.run import Outcome
from infra.harness.reporting import machine

READERS = {
    "fresh": "as published, just before the action",
    "daily": "as of the last midnight (batch)",
    "once": "as of the start of the replay",
    "popular": "no embedding: most acted-on of seven days",
}
TEXT_COLUMNS = 118
NOTES = """\
Freshness: from handing an event to Kafka until a subscriber holds an embedding that contains it. The log's own event
times are history; by clock time the replay presses {days:,.0f} days into {seconds:.0f} s, so several actions of a user
often share one embedding, and "fresh" is what was published, not what slower traffic would have had.
Recall@10: was the item in the ten best of the release's {items:,} items, those the user had acted on before left out?
Every reader is asked at the same moment and differs in the embedding alone; none of them has seen an action of the
same second. No embedding, or an item unknown to the release, is a miss."""


def freshness_percentiles(outcome: Outcome) -> tuple[float, float, float]:
    """p50, p90 and p99 in milliseconds, from handing the event to Kafka to holding the embedding."""
    known = outcome.streamed.freshness_ms
    known = known[known >= 0]
    if not len(known):
        return math.nan, math.nan, math.nan
    p50, p90, p99 = np.percentile(known, [50, 90, 99]).tolist()
    return p50, p90, p99


def events_per_second(outcome: Outcome) -> float:
    """Replayed events over the seconds that replaying them took."""
    totals = outcome.streamed.totals
    return totals.acknowledged / max(totals.seconds, 1e-9)


def embeddings(outcome: Outcome) -> int:
    """Published in all."""
    return outcome.streamed.published_before + len(outcome.streamed.seen)


def print_report(outcome: Outcome, console: Console) -> None:
    """The report as text."""
    facts = Table.grid(padding=(0, 2))
    for name, value in (*_flow(outcome), *_recount(outcome), ("seconds", _seconds(outcome))):
        facts.add_row(name, value)
    console.print(facts, highlight=False)
    console.print()
    console.print(_recall_table(outcome), highlight=False)
    console.print(_notes(outcome), highlight=False, soft_wrap=True)
    for fault in outcome.recount.faults:
        console.print(f"FAULT: {fault}", style="bold red")


def save_text(outcome: Outcome, path: Path) -> Path:
    """The report in a file; returns its path."""
    with path.open("w", encoding="utf-8") as file:
        print_report(outcome, Console(file=file, width=TEXT_COLUMNS))
    return path


def _flow(outcome: Outcome) -> list[tuple[str, str]]:
    parts, streamed = outcome.parts, outcome.streamed
    p50, p90, p99 = freshness_percentiles(outcome)
    triggers = ", ".join(f"{reason} {count:,}" for reason, count in sorted(streamed.reasons.items()))
    newer = len(parts.log) - parts.cut
    return [
        ("actions", f"{parts.origin}: {parts.cut:,} as history, {newer:,} replayed"),
        ("history", f"{streamed.published_before:,} embeddings, caught up in {streamed.catch_up_s:.1f} s"),
        ("replay", f"{streamed.totals.seconds:.1f} s, {events_per_second(outcome):,.0f} events a second"),
        ("embeddings", f"{len(streamed.seen):,} during the replay; triggers: {triggers}"),
        ("freshness", f"p50 {p50:,.0f} ms, p90 {p90:,.0f} ms, p99 {p99:,.0f} ms"),
    ]


def _recount(outcome: Outcome) -> list[tuple[str, str]]:
    counted = outcome.recount
    late = f" ({counted.late_dropped:,} too late for a full sequence)" if counted.late_dropped else ""
    return [
        ("lost", f"{counted.lost:,} of {counted.events:,} events{late}, recounted from the input topic"),
        ("duplicated", f"{counted.duplicated:,}"),
        ("dead letters", f"{counted.dead_letters:,}"),
        ("outdated", f"{counted.outdated:,} users whose last embedding lacks their last action"),
        (
            "parity",
            f"{counted.parity_users:,} users recomputed in batch: cosine at least {counted.cosine_min:.6f}, "
            f"difference at most {counted.difference_max:.1e}",
        ),
    ]


def _seconds(outcome: Outcome) -> str:
    steps = ", ".join(f"{name} {seconds:.0f}" for name, seconds in outcome.step_s.items())
    return f"{outcome.seconds:.0f} in all: {steps}"


def _recall_table(outcome: Outcome) -> Table:
    recalls = outcome.recalls
    table = Table(title="What freshness bought: Recall@10 over the replayed actions", title_justify="left")
    table.add_column("embedding of the user")
    for group, text in GROUPS.items():
        table.add_column(f"{text} ({recalls.actions[group]:,})", justify="right")
    for reader, text in READERS.items():
        table.add_row(f"{reader}: {text}", *(_share(recalls.recall[reader][group]) for group in GROUPS))
    return table


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _notes(outcome: Outcome) -> str:
    times_ms = outcome.parts.newer.timestamp_ms
    days = (int(times_ms.max()) - int(times_ms.min())) / 86_400_000
    items = len(outcome.release.vocabularies.item_keys)
    return NOTES.format(days=days, seconds=outcome.streamed.totals.seconds, items=items)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The figures of the last line."""
    p50, _, p99 = freshness_percentiles(outcome)
    counted, recall = outcome.recount, outcome.recalls.recall
    return {
        "bench": "demo",
        "machine": machine(),
        "events": counted.events,
        "embeddings": embeddings(outcome),
        "lost": counted.lost,
        "duplicated": counted.duplicated,
        "dead_letters": counted.dead_letters,
        "freshness_p50_ms": _number(p50),
        "freshness_p99_ms": _number(p99),
        "events_per_second": round(events_per_second(outcome), 1),
        "recall10_fresh": _number(recall["fresh"]["all"]),
        "recall10_daily": _number(recall["daily"]["all"]),
        "recall10_once": _number(recall["once"]["all"]),
        "recall10_popular": _number(recall["popular"]["all"]),
        "parity_cosine_min": _number(counted.cosine_min),
        "seconds": round(outcome.seconds, 1),
    }


def _number(value: float) -> float | None:
    """Rounded; None for NaN, which JSON does not have."""
    return None if math.isnan(value) else round(value, 6)
