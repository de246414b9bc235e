"""What freshness is worth on a log: the same questions, put to readers that hold embeddings of different age.

For an action of a user at event time t, each reader holds the embedding after the user's newest action strictly before
a time of its own: t itself, the last whole hour, the last midnight, the start of the session, the start of the table,
or t less a fixed staleness. Was the item acted on among the ten that this embedding scores highest? Everything else is
equal: items, release, and the items left out of the ranking, which are those acted on before t. A reader that holds
nothing yet misses. Only users with an action before the table's start are asked about, so every reader could know
them. The rows are those of PinnerFormer's table 2 (KDD 2022, arXiv 2205.04507), and finer.
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
    """One row of the table."""

    name: str
    staleness_ms: int | None
    """Of a reader that is always so far behind; None for one that follows a schedule."""
    hr10: float
    interval: tuple[float, float]
    """95 %, users drawn anew."""
    behind: float
    """HR@10 less than that of the embedding after every action, on the same questions."""
    behind_interval: tuple[float, float]
    empty: float
    """Share of the questions at which it held nothing."""


@dataclass(frozen=True, slots=True)
class FreshnessTable:
    """All readers on one set of questions."""

    from_ms: int
    until_ms: int
    questions: int
    users: int
    readers: list[Reader]
    """Schedules from once to every action, then the staleness curve, shortest first."""


def freshness_table(
    release: Release,
    log: ActionLog,
    *,
    from_ms: int,
    days: float = 14.0,
    session_gap_minutes: float = 30.0,
    hide_seen: bool = True,
    questions_max: int = 20_000,
    seed: int = 1,
) -> FreshnessTable:
    """The table over the actions in [from_ms, from_ms + days), at most `questions_max` of them. Raises `LogError`."""
    tokens = log.tokens(release.vocabularies)
    time_ms, newest = tokens.time_ms, NewestRows(log.starts, tokens.time_ms)
    until_ms = from_ms + round(days * DAY_MS)
    answers = _answers(log, newest, time_ms, (from_ms, until_ms), questions_max, seed)
    user, when = log.user_of_row[answers], time_ms[answers]
    sessions_ms = session_starts_ms(log.starts, time_ms, round(session_gap_minutes * MINUTE_MS))
    limits: dict[str, tuple[int | None, I64]] = {
        "once": (None, np.full_like(when, from_ms)),
        "daily": (None, when // DAY_MS * DAY_MS),
        "hourly": (None, when // HOUR_MS * HOUR_MS),
        "per session": (None, sessions_ms[answers]),
        "every action": (None, when),
    }
    limits |= {name: (ms, when - ms) for name, ms in STALENESS_MS.items()}
    held = {name: newest.before(user, limit) for name, (_, limit) in limits.items()}
    hits = held_hits(release, log, answers, held, hide_seen=hide_seen)
    readers = [
        _reader(name, limits[name][0], hits[name], hits["every action"], held[name] < 0, user, seed) for name in limits
    ]
    return FreshnessTable(from_ms, until_ms, len(answers), len(np.unique(user)), readers)


def _answers(
    log: ActionLog, newest: NewestRows, time_ms: I64, span: tuple[int, int], questions_max: int, seed: int
) -> I64:
    rows = np.flatnonzero((time_ms >= span[0]) & (time_ms < span[1]))
    rows = rows[newest.before(log.user_of_row[rows], np.full_like(rows, span[0])) >= 0]
    if not len(rows):
        raise LogError("no action of a user who acted before the table's start: name another start or a longer log")
    return np.sort(np.random.default_rng(seed).permutation(rows)[:questions_max])


def session_starts_ms(starts: I64, time_ms: I64, gap_ms: int) -> I64:
    """[N] event time at which the session of each row began; a session ends where nothing happens for `gap_ms`."""
    begins = np.ones(len(time_ms), np.bool_)
    begins[1:] = np.diff(time_ms) >= gap_ms
    begins[starts[:-1][np.diff(starts) > 0]] = True
    session = np.cumsum(begins) - 1
    first: I64 = time_ms[begins][session]
    return first


def held_hits(
    release: Release, log: ActionLog, answers: I64, held: dict[str, I64], *, hide_seen: bool
) -> dict[str, F64]:
    """For each reader, [Q] 1 where the answer is among the ten best of the embedding after row `held` (-1: none)."""
    tokens, items = log.tokens(release.vocabularies), known_items(release.model)
    rows = np.unique(np.concatenate([np.zeros(0, np.int64), *held.values()]))
    rows = rows[rows >= 0]
    with torch.inference_mode():
        vectors = embeddings_after(release.model, tokens, log.starts, rows)
    target = tokens.item[answers]
    seen = held["every action"]
    result = {}
    for name, mine in held.items():
        asked = np.flatnonzero((mine >= 0) & (target != UNKNOWN))
        hidden = known_pairs(items_before(tokens, log.starts, seen[asked])) if hide_seen else None
        ranks = np.full(len(answers), MISSED)
        queries = vectors[torch.from_numpy(np.searchsorted(rows, mine[asked]))]
        ranks[asked] = target_ranks(queries, items, target[asked] - 1, hidden)
        result[name] = hits_at(ranks, 10)
    return result


def _reader(
    name: str,
    staleness_ms: int | None,
    hits: F64,
    fresh: F64,
    empty: Bool,
    user: I64,
    seed: int,
) -> Reader:
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
    """A picture: the staleness curve with its intervals, the schedules as lines across it."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    curve = [reader for reader in table.readers if reader.staleness_ms is not None]
    hours = [(reader.staleness_ms or 0) / HOUR_MS for reader in curve]
    draw: Callable[..., object] = axes.fill_between
    draw(hours, [r.interval[0] for r in curve], [r.interval[1] for r in curve], alpha=0.2, linewidth=0)
    axes.plot(hours, [r.hr10 for r in curve], marker="o", label="always so far behind")
    for place, reader in enumerate(r for r in table.readers if r.staleness_ms is None):
        axes.axhline(reader.hr10, color=f"C{place + 1}", linestyle="--", label=reader.name)
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
