"""What the demo found, as text for people and as one JSON object for scripts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from infra.bench.common import machine
from infra.demo.readers import GROUPS
from infra.demo.run import Outcome

READERS = {
    "fresh": "as published, before the action",
    "daily": "as of the last midnight (batch)",
    "once": "as of the start of the replay",
    "popular": "ten most popular of the last week",
}


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


def print_report(outcome: Outcome, console: Console) -> None:
    """The report as text."""
    p50, p90, p99 = freshness_percentiles(outcome)
    parts, streamed, counted = outcome.parts, outcome.streamed, outcome.recount
    rate, embeddings = events_per_second(outcome), streamed.published_before + len(streamed.seen)
    triggers = ", ".join(f"{reason} {count:,}" for reason, count in sorted(streamed.reasons.items()))
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("actions", f"{parts.origin}: {parts.cut:,} as history, {len(parts.log) - parts.cut:,} replayed"),
        ("replay", f"{streamed.totals.seconds:.1f} s, {rate:,.0f} events a second; triggers: {triggers}"),
        ("embeddings", f"{embeddings:,} published, {len(streamed.seen):,} during the replay"),
        (
            "freshness",
            f"p50 {p50:,.0f} ms, p90 {p90:,.0f} ms, p99 {p99:,.0f} ms (event sent to embedding received)",
        ),
        ("lost", f"{counted.lost:,} of {counted.events:,} events, recounted from the input topic"),
        ("duplicated", f"{counted.duplicated:,}"),
        ("dead letters", f"{counted.dead_letters:,}"),
        (
            "parity",
            f"{counted.parity_users:,} users recomputed in batch: cosine at least {counted.cosine_min:.6f}, "
            f"difference at most {counted.difference_max:.1e}",
        ),
    ):
        facts.add_row(name, value)
    console.print(facts, highlight=False)
    console.print(_recall_table(outcome), highlight=False)
    for fault in counted.faults:
        console.print(f"FAULT: {fault}", style="bold red")


def _recall_table(outcome: Outcome) -> Table:
    recalls = outcome.recalls
    table = Table(title="What freshness bought: Recall@10 over the replayed actions", title_justify="left")
    table.add_column("embedding of the user")
    for group in GROUPS:
        table.add_column(f"{group} ({recalls.actions[group]:,})", justify="right")
    for reader, text in READERS.items():
        table.add_row(f"{reader}: {text}", *(f"{recalls.recall[reader][group]:.4f}" for group in GROUPS))
    return table


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The figures of the last line."""
    p50, _, p99 = freshness_percentiles(outcome)
    counted, recall = outcome.recount, outcome.recalls.recall
    return {
        "bench": "demo",
        "machine": machine(),
        "events": counted.events,
        "embeddings": outcome.streamed.published_before + len(outcome.streamed.seen),
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
    return None if math.isnan(value) else round(value, 6)
