"""Evaluation protocols: which queries a release is evaluated on.

*Leave one out* takes each user's last action as the target. *Rolling* takes every action from a time on, in consecutive
spans; the query of an action sees only what its user did strictly before it, so that actions with equal timestamps do
not see each other.
"""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import Any

import numpy as np

from encoder.data.log import ActionLog, LogError
from encoder.data.split import Queries, SplitConfig, make_split
from encoder.evaluation.queries import NewestRows
from encoder.release import Release


def leave_one_out(log: ActionLog, *, items_min: int, queries_max: int, seed: int) -> tuple[ActionLog, Queries]:
    """Return the log without rare items, and a query for the last action of every user with three or more."""
    config = SplitConfig("leave_one_out", items_min=items_min, questions_max=queries_max)
    split = make_split(log, config, seed=seed)
    return split.log, split.test


def rolling(log: ActionLog, *, from_ms: int, spans: int, queries_max: int, seed: int) -> list[tuple[str, Queries]]:
    """Return the queries of each span, by name; the spans divide the time from `from_ms` to the end of the log equally.

    At most `queries_max` queries are sampled per span. Raises `LogError` if there are none.
    """
    time_ms = log.actions["timestamp_ms"]
    later = np.flatnonzero(time_ms >= from_ms)
    newest = NewestRows(log.starts, time_ms).before(log.user_of_row[later], time_ms[later])
    targets, newest = later[newest >= 0], newest[newest >= 0]
    if not len(targets):
        raise LogError(f"no action of a known user from {day(from_ms)} on: name an earlier start or a longer log")
    bounds = np.linspace(from_ms, int(time_ms.max()) + 1, spans + 1).astype(np.int64)
    rng = np.random.default_rng(seed)
    parts = []
    for begin, end in itertools.pairwise(bounds.tolist()):
        inside = np.flatnonzero((time_ms[targets] >= begin) & (time_ms[targets] < end))
        inside = np.sort(rng.permutation(inside)[:queries_max])
        if len(inside):
            parts.append((f"{day(begin)} to {day(end)}", Queries(newest[inside], targets[inside])))
    return parts


def unseen_from_ms(release: Release) -> int | None:
    """Return the event time from which on the release was neither trained nor validated; None if it has no record."""
    value: Any = release.training.get("later_ms")
    return value if isinstance(value, int) else None


def day(time_ms: int) -> str:
    """Return the UTC date of a time."""
    return datetime.fromtimestamp(int(time_ms) / 1_000, UTC).strftime("%Y-%m-%d")
