"""The value of freshness on a log: the same queries, answered with embeddings of different age.

A query is an action of a user at event time t. Each reader holds the user's embedding after the newest action strictly
before a cutoff of its own: t itself, the last full hour, the last midnight, the start of the session, the start of the
table, or t minus a fixed staleness. The query is a hit if its item is among the ten items that this embedding scores
highest. Everything else is equal for all readers: the items, the release, and the masked items, which are those acted
on before t. A reader without an embedding for the user misses. Only users with an action before the start of the table
are queried, so every reader could have an embedding for them. The schedules are those of PinnerFormer's table 2
(arXiv 2205.04507) and finer ones.

Shapes: N actions, Q queries, V distinct rows with an embedding, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from encoder.arrays import F64, I64, Bool
from encoder.data.log import DAY_MS, ActionLog, LogError
from encoder.evaluation.next_item import MISSED, known_items, known_pairs
from encoder.evaluation.queries import NewestRows, embeddings_after, items_before
from encoder.evaluation.ranking import bootstrap_interval, hits_at, target_ranks
from encoder.features import UNKNOWN
from encoder.release import Release

HOUR_MS, MINUTE_MS = 3_600_000, 60_000
STALENESS_MS = {
    "1 minute": MINUTE_MS,
    "10 minutes": 10 * MINUTE_MS,
    "1 hour": HOUR_MS,
    "6 hours": 6 * HOUR_MS,
    "1 day": DAY_MS,
    "3 days": 3 * DAY_MS,
    "7 days": 7 * DAY_MS,
    "14 days": 14 * DAY_MS,
}


@dataclass(frozen=True, slots=True)
class Reader:
    """Metrics of one reader: a row of the table. The field names are keys of the JSON line."""

    name: str
    staleness_ms: int | None
    """Constant age of the embeddings; None for a reader that follows a schedule."""
    hr10: float
    interval: tuple[float, float]
    """95 % bootstrap interval of `hr10`, resampling users."""
    behind: float
    """Difference: HR@10 of "every action" minus `hr10`, on the same queries."""
    behind_interval: tuple[float, float]
    """95 % bootstrap interval of `behind`."""
    empty: float
    """Share of the queries for which the reader had no embedding."""


@dataclass(frozen=True, slots=True)
class FreshnessTable:
    """Metrics of all readers on one set of queries. The field names are keys of the JSON line."""

    from_ms: int
    until_ms: int
    questions: int
    """Number of queries."""
    users: int
    """Number of users with a query."""
    readers: list[Reader]
    """Schedules from "once" to "every action", then the staleness curve, shortest first."""


@dataclass(frozen=True, slots=True)
class FreshnessOptions:
    """Options of a freshness table."""

    days: float = 14.0
    """Length of the evaluated time."""
    session_gap_minutes: float = 30.0
    """Inactivity that ends a session."""
    mask_seen: bool = True
    """Whether items that the user has acted on are left out of the ranking."""
    queries_max: int = 20_000
    """Maximum number of queries; a larger set is sampled."""
    seed: int = 1
    """Seed of the sample and of the bootstrap."""


def freshness_table(
    release: Release, log: ActionLog, *, from_ms: int, options: FreshnessOptions = FreshnessOptions()
) -> FreshnessTable:
    """Evaluate all readers on the actions in [from_ms, from_ms + days). Raises `LogError` if there are no queries."""
    tokens = log.tokens(release.vocabularies)
    time_ms, newest = tokens.time_ms, NewestRows(log.starts, tokens.time_ms)
    until_ms = from_ms + round(options.days * DAY_MS)
    targets = _targets(log, newest, time_ms, (from_ms, until_ms), options)  # [Q]
    user, when = log.user_of_row[targets], time_ms[targets]
    sessions_ms = session_starts_ms(log.starts, time_ms, round(options.session_gap_minutes * MINUTE_MS))
    cutoffs: dict[str, tuple[int | None, I64]] = {  # reader -> staleness, cutoff [Q]
        "once": (None, np.full_like(when, from_ms)),
        "daily": (None, when // DAY_MS * DAY_MS),
        "hourly": (None, when // HOUR_MS * HOUR_MS),
        "per session": (None, sessions_ms[targets]),
        "every action": (None, when),
    }
    cutoffs |= {name: (ms, when - ms) for name, ms in STALENESS_MS.items()}
    held = {name: newest.before(user, cutoff) for name, (_, cutoff) in cutoffs.items()}  # reader -> row [Q]
    hits = held_hits(release, log, targets, held, mask_seen=options.mask_seen)
    fresh = hits["every action"]
    readers = [
        _reader(name, staleness_ms, (hits[name], fresh, held[name] < 0), user, options.seed)
        for name, (staleness_ms, _) in cutoffs.items()
    ]
    return FreshnessTable(from_ms, until_ms, len(targets), len(np.unique(user)), readers)


def _targets(log: ActionLog, newest: NewestRows, time_ms: I64, span: tuple[int, int], options: FreshnessOptions) -> I64:
    """Return the rows [Q] to predict: actions within the span, of users who had acted before it."""
    rows = np.flatnonzero((time_ms >= span[0]) & (time_ms < span[1]))
    rows = rows[newest.before(log.user_of_row[rows], np.full_like(rows, span[0])) >= 0]
    if not len(rows):
        raise LogError("no action of a user who acted before the table's start: name another start or a longer log")
    return np.sort(np.random.default_rng(options.seed).permutation(rows)[: options.queries_max])


def session_starts_ms(starts: I64, time_ms: I64, gap_ms: int) -> I64:
    """Return the event time [N] at which the session of each row began; `gap_ms` without an action ends a session.

    >>> session_starts_ms(np.array([0, 4, 5]), np.array([0, 5, 15, 24, 30]), 10).tolist()
    [0, 0, 15, 15, 30]
    """
    begins = np.ones(len(time_ms), np.bool_)  # [N] True where a session begins
    begins[1:] = np.diff(time_ms) >= gap_ms
    begins[starts[:-1][np.diff(starts) > 0]] = True
    session = np.cumsum(begins) - 1  # [N] number of each row's session
    first: I64 = time_ms[begins][session]
    return first


def held_hits(
    release: Release, log: ActionLog, targets: I64, held: dict[str, I64], *, mask_seen: bool
) -> dict[str, F64]:
    """Return each reader's hits [Q]: 1 if the target is in the top ten of the embedding after row `held` (-1: none)."""
    tokens, items = log.tokens(release.vocabularies), known_items(release.model)
    rows = np.unique(np.concatenate([np.zeros(0, np.int64), *held.values()]))
    rows = rows[rows >= 0]  # [V] every row is embedded once, however many readers hold it
    with torch.inference_mode():
        vectors = embeddings_after(release.model, tokens, log.starts, rows)  # [V, E]
    target = tokens.item[targets]
    seen = held["every action"]
    result = {}
    for name, held_rows in held.items():
        ranked = np.flatnonzero((held_rows >= 0) & (target != UNKNOWN))  # all other queries are misses
        masked = known_pairs(items_before(tokens, log.starts, seen[ranked])) if mask_seen else None
        ranks = np.full(len(targets), MISSED)
        queries = vectors[torch.from_numpy(np.searchsorted(rows, held_rows[ranked]))]
        ranks[ranked] = target_ranks(queries, items, target[ranked] - 1, masked)
        result[name] = hits_at(ranks, 10)
    return result


def _reader(name: str, staleness_ms: int | None, columns: tuple[F64, F64, Bool], user: I64, seed: int) -> Reader:
    """Summarise a reader from its hits [Q], the hits of "every action" [Q] and where it had no embedding [Q]."""
    hits, fresh, empty = columns
    difference = fresh - hits
    return Reader(
        name,
        staleness_ms,
        float(hits.mean()),
        bootstrap_interval(hits, user, seed=seed),
        float(difference.mean()),
        bootstrap_interval(difference, user, seed=seed),
        float(empty.mean()),
    )


def plot_freshness(table: FreshnessTable, path: Path) -> None:
    """Plot the staleness curve with its intervals, and the schedules as horizontal lines."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    curve = [reader for reader in table.readers if reader.staleness_ms is not None]
    hours = [(reader.staleness_ms or 0) / HOUR_MS for reader in curve]
    draw: Callable[..., object] = axes.fill_between
    draw(hours, [r.interval[0] for r in curve], [r.interval[1] for r in curve], alpha=0.2, linewidth=0)
    axes.plot(hours, [r.hr10 for r in curve], marker="o", label="constant staleness")
    for number, reader in enumerate(r for r in table.readers if r.staleness_ms is None):
        axes.axhline(reader.hr10, color=f"C{number + 1}", linestyle="--", label=reader.name)
    axes.set_xscale("log")
    axes.set_xticks(hours, [reader.name for reader in curve], rotation=30, minor=False)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("staleness of the embedding")
    axes.set_ylabel("HR@10")
    axes.set_title(f"{table.questions:,} actions of {table.users:,} users")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
