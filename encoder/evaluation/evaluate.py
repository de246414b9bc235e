"""What a release is worth on a log: the item that came next, ranked, with popularity beside it.

Two protocols ask the questions. *Leave one out*: each user's last action. *Rolling*: every action from a time on, in
consecutive spans, each asked with what the user had done strictly before it, so actions of one second do not see each
other. Scores that read the time of the request stand in a table of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv

from encoder.actions.columns import item_key
from encoder.arrays import I64
from encoder.data.log import ActionLog, LogError
from encoder.data.split import Questions, SplitConfig, make_split
from encoder.evaluation.next_item import NextItemEvaluator, Scores, known_items
from encoder.evaluation.queries import NewestRows
from encoder.evaluation.ranking import bootstrap_interval, interest_entropy, p90_coverage
from encoder.features import Vocabularies
from encoder.release import Release

INTEREST_TOP = 50


@dataclass(frozen=True, slots=True)
class Column:
    """What one way of ranking scored."""

    hr10: float
    hr10_interval: tuple[float, float]
    """95 %, users drawn anew."""
    ndcg10: float

    @classmethod
    def of(cls, scores: Scores, users: I64, seed: int) -> Column:
        interval = bootstrap_interval((scores.ranks < 10).astype(np.float64), users, seed=seed)
        return cls(scores.hr10, interval, scores.ndcg10)


@dataclass(frozen=True, slots=True)
class Part:
    """The scores of one set of questions."""

    name: str
    questions: int
    unknown: int
    """Questions whose answer the release does not know; misses, for everyone."""
    time_blind: Column
    time_given: Column | None
    """With the time of the request; only where the release has a read-out."""
    popularity: Column
    p90_coverage10: float
    interest_entropy50: float | None
    """None without interests."""


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """How questions are graded."""

    hide_seen: bool
    candidates: int = 0
    """Answers are ranked among so many random items, the same for all; 0 for all items."""
    interests: I64 | None = None
    """[I] interest of each item of the vocabulary."""
    seed: int = 1


def leave_one_out(log: ActionLog, *, items_min: int, questions_max: int, seed: int) -> tuple[ActionLog, Questions]:
    """The log without rare items and the last action of every user with three or more."""
    config = SplitConfig("leave_one_out", items_min=items_min, questions_max=questions_max)
    split = make_split(log, config, seed=seed)
    return split.log, split.test


def rolling(log: ActionLog, *, from_ms: int, spans: int, questions_max: int, seed: int) -> list[tuple[str, Questions]]:
    """Spans of equal time from `from_ms` to the end of the log, each with its questions. Raises `LogError`."""
    time_ms = log.actions["timestamp_ms"]
    later = np.flatnonzero(time_ms >= from_ms)
    asked = NewestRows(log.starts, time_ms).before(log.user_of_row[later], time_ms[later])
    answers, asked = later[asked >= 0], asked[asked >= 0]
    if not len(answers):
        raise LogError(f"no action of a known user from {day(from_ms)} on: name an earlier start or a longer log")
    bounds = np.linspace(from_ms, int(time_ms.max()) + 1, spans + 1).astype(np.int64)
    rng = np.random.default_rng(seed)
    parts = []
    for begin, end in itertools.pairwise(bounds.tolist()):
        inside = np.flatnonzero((time_ms[answers] >= begin) & (time_ms[answers] < end))
        inside = np.sort(rng.permutation(inside)[:questions_max])
        if len(inside):
            parts.append((f"{day(begin)} to {day(end)}", Questions(asked[inside], answers[inside])))
    return parts


def grade(release: Release, log: ActionLog, name: str, questions: Questions, grading: EvaluationOptions) -> Part:
    """All scores of one set of questions."""
    model, items = release.model, known_items(release.model)
    candidates = None
    if grading.candidates and grading.candidates < len(items):
        candidates = np.random.default_rng(grading.seed).permutation(len(items))[: grading.candidates]
    evaluator = NextItemEvaluator(
        log, release.vocabularies, questions, hide_seen=grading.hide_seen, candidates=candidates
    )
    if not evaluator.known.any():
        raise LogError(f"the release knows no item of the {len(questions):,} answers: is this the log of its items?")
    users = log.user_of_row[questions.answer]
    queries = evaluator.queries(model)
    given = (
        Column.of(evaluator.encoder_scores(model, time_given=True), users, grading.seed)
        if model.config.read_out
        else None
    )
    return Part(
        name=name,
        questions=len(questions),
        unknown=int(np.count_nonzero(~evaluator.known)),
        time_blind=Column.of(evaluator.scores(queries, items), users, grading.seed),
        time_given=given,
        popularity=Column.of(evaluator.popularity_scores(), users, grading.seed),
        p90_coverage10=p90_coverage(evaluator.top(queries, items, min(10, len(items))), items=len(items)),
        interest_entropy50=None
        if grading.interests is None
        else float(
            interest_entropy(evaluator.top(queries, items, min(INTEREST_TOP, len(items))), grading.interests).mean()
        ),
    )


def read_interests(path: Path, vocabularies: Vocabularies) -> I64:
    """[I] interest of each known item, from a CSV with the columns `item_id` and `interest`; 0 for items not named."""
    try:
        table = pyarrow.csv.read_csv(path)
        keys = [item_key(str(value)) for value in table["item_id"].to_pylist()]
        names = [str(value) for value in table["interest"].to_pylist()]
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        detail = " ".join(str(error).split())
        raise LogError(
            f"interests cannot be read: {path} ({detail}); it needs the columns item_id, interest"
        ) from error
    number = {name: place for place, name in enumerate(sorted(set(names)), start=1)}
    by_key = dict(zip(keys, names, strict=True))
    known: Sequence[int] = vocabularies.item_keys.tolist()
    return np.array([number[by_key[key]] if key in by_key else 0 for key in known], np.int64)


def later_ms(release: Release) -> int | None:
    """The event time from which on the release was neither trained nor validated, as far as it says."""
    value: Any = release.training.get("later_ms")
    return value if isinstance(value, int) else None


def day(time_ms: int) -> str:
    """The UTC day of a time."""
    return datetime.fromtimestamp(int(time_ms) / 1_000, UTC).strftime("%Y-%m-%d")
