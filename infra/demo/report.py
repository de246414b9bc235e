"""The report of the demo: text for people and one JSON object for scripts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from infra.demo.features import FeatureRecount
from infra.demo.readers import GROUPS
from infra.demo.run import Outcome
from infra.harness.freshness import percentiles
from infra.harness.reporting import machine

READERS = {
    "fresh": "as published, just before the action",
    "daily": "as of the last midnight (batch)",
    "once": "as of the start of the replay",
    "popular": "no embedding: most popular of seven days",
}
TEXT_COLUMNS = 118
EXAMPLE_COLUMNS = 100
NOTES = """\
Freshness: from handing an event to Kafka to receiving an embedding that contains it. The replay compresses
{days:,.0f} days into {seconds:.0f} s, so several actions of a user often share one embedding; "fresh" is the embedding
as published here, which slower traffic would publish more often.
Recall@10: share of actions whose item is among the ten best of the release's {items:,} items, without those that the
user had acted on before. All readers are compared at the same moments and differ in the embedding only; none has seen
an action of the same second. A missing embedding and an item unknown to the release count as misses."""


def freshness_percentiles(outcome: Outcome) -> tuple[float, float, float]:
    """Return p50, p90 and p99 of the replay, in milliseconds."""
    p50, p90, p99 = percentiles(outcome.streamed.freshness_ms, 50, 90, 99)
    return p50, p90, p99


def events_per_second(outcome: Outcome) -> float:
    """Return the replayed events per second of the replay."""
    totals = outcome.streamed.totals
    return totals.acknowledged / max(totals.seconds, 1e-9)


def embeddings(outcome: Outcome) -> int:
    """Return the number of all published embeddings."""
    return outcome.streamed.published_before + len(outcome.streamed.embeddings)


def print_report(outcome: Outcome, console: Console) -> None:
    """Print the report."""
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
    """Write the report to a file and return its path."""
    with path.open("w", encoding="utf-8") as file:
        print_report(outcome, Console(file=file, width=TEXT_COLUMNS))
    return path


def _flow(outcome: Outcome) -> list[tuple[str, str]]:
    split, streamed = outcome.split, outcome.streamed
    p50, p90, p99 = freshness_percentiles(outcome)
    triggers = ", ".join(f"{reason} {count:,}" for reason, count in sorted(streamed.reasons.items()))
    newer = len(split.log) - split.cut
    return [
        ("actions", f"{split.origin}: {split.cut:,} as history, {newer:,} replayed"),
        ("history", f"{streamed.published_before:,} embeddings, caught up in {streamed.catch_up_s:.1f} s"),
        ("replay", f"{streamed.totals.seconds:.1f} s, {events_per_second(outcome):,.0f} events per second"),
        ("embeddings", f"{len(streamed.embeddings):,} during the replay; triggers: {triggers}"),
        ("freshness", f"p50 {p50:,.0f} ms, p90 {p90:,.0f} ms, p99 {p99:,.0f} ms"),
    ]


def _recount(outcome: Outcome) -> list[tuple[str, str]]:
    counted = outcome.recount
    late = f" ({counted.late_dropped:,} too late for a full sequence)" if counted.late_dropped else ""
    return [
        ("lost", f"{counted.lost:,} of {counted.events:,} events{late}, compared with the input topic by content"),
        ("duplicated", f"{counted.duplicated:,}"),
        ("misordered", f"{counted.misordered:,} users"),
        ("dead letters", f"{counted.dead_letters:,}"),
        ("outdated", f"{counted.outdated:,} users whose last embedding does not contain their last action"),
        (
            "parity",
            f"{counted.parity_users:,} users recomputed in batch: cosine at least {counted.cosine_min:.6f}, "
            f"difference at most {counted.difference_max:.1e}",
        ),
        *_features(counted.features),
    ]


def _features(found: FeatureRecount | None) -> list[tuple[str, str]]:
    """Return the lines about features: what was recomputed, and the values of one user, cut to the width."""
    if found is None:
        return [("features", "none, because there is no C++ compiler")]
    user, values = found.example
    shown = ", ".join(f"{name}: {_shown(value)}" for name, value in values.items())
    example = f"of user {user}: {shown}"
    is_long = len(example) > EXAMPLE_COLUMNS
    return [
        ("features", f"{found.published:,} published, {found.users:,} users recomputed, {len(found.wrong):,} wrong"),
        ("", f"{example[: EXAMPLE_COLUMNS - 1]}…" if is_long else example),
    ]


def _shown(value: Any) -> str:
    """Return the value of a feature as short text.

    >>> _shown(2.0), _shown(None), _shown([["1990s", 1.25], ["1980s", 1]]), _shown(["a"])
    ('2', 'none', '[1990s 1.2, 1980s 1]', '[a]')
    """
    if isinstance(value, list):
        return f"[{', '.join(' '.join(map(_shown, one)) if isinstance(one, list) else _shown(one) for one in value)}]"
    if value is None:
        return "none"
    return f"{value:,.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def _seconds(outcome: Outcome) -> str:
    steps = ", ".join(f"{name} {seconds:.0f}" for name, seconds in outcome.step_s.items())
    return f"{outcome.seconds:.0f} in total: {steps}"


def _recall_table(outcome: Outcome) -> Table:
    recalls = outcome.recalls
    table = Table(title="The value of freshness: Recall@10 over the replayed actions", title_justify="left")
    table.add_column("embedding of the user")
    for group, text in GROUPS.items():
        table.add_column(f"{text} ({recalls.actions[group]:,})", justify="right")
    for reader, text in READERS.items():
        table.add_row(f"{reader}: {text}", *(_share(recalls.recall[reader][group]) for group in GROUPS))
    return table


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _notes(outcome: Outcome) -> str:
    times_ms = outcome.split.newer.timestamp_ms
    days = (int(times_ms.max()) - int(times_ms.min())) / 86_400_000
    items = len(outcome.release.vocabularies.item_keys)
    return NOTES.format(days=days, seconds=outcome.streamed.totals.seconds, items=items)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Return the figures of the last line."""
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
        "features": counted.features.published if counted.features else None,
        "features_wrong": len(counted.features.wrong) if counted.features else None,
        "parity_cosine_min": _number(counted.cosine_min),
        "seconds": round(outcome.seconds, 1),
    }


def _number(value: float) -> float | None:
    """Return the rounded value; None for NaN, which JSON does not have."""
    return None if math.isnan(value) else round(value, 6)
