"""Next-item evaluation of a release on a set of queries, next to a popularity baseline.

Metrics that use the time of the request ("time-given") are reported separately from those that do not ("time-blind").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.csv

from encoder.actions.columns import item_key
from encoder.arrays import I64
from encoder.data.log import ActionLog, LogError
from encoder.data.split import Queries
from encoder.evaluation.next_item import NextItemEvaluator, Scores, known_items
from encoder.evaluation.ranking import bootstrap_interval, hits_at, interest_entropy, p90_coverage
from encoder.features import Vocabularies
from encoder.release import Release

INTEREST_TOP = 50
"""Number of recommendations whose interests enter the entropy."""


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """Options of an evaluation."""

    mask_seen: bool
    """Whether items that the user has acted on are left out of the ranking."""
    candidates: int = 0
    """Number of random items, the same for all queries, that targets are ranked among; 0 for the whole catalogue."""
    interests: I64 | None = None
    """[I] interest of each item of the vocabulary, from `read_interests`."""
    seed: int = 1
    """Seed of the candidates and of the bootstrap."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Metrics of one way of ranking; the field names are keys of the JSON line."""

    hr10: float
    hr10_interval: tuple[float, float]
    """95 % bootstrap interval of `hr10`, resampling users."""
    ndcg10: float

    @classmethod
    def of(cls, scores: Scores, users: I64, seed: int) -> Metrics:
        """Return the metrics of scores whose queries belong to `users` [Q]."""
        interval = bootstrap_interval(hits_at(scores.ranks, 10), users, seed=seed)
        return cls(scores.hr10, interval, scores.ndcg10)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics of one set of queries; the field names are keys of the JSON line."""

    name: str
    questions: int
    """Number of queries."""
    unknown: int
    """Number of queries whose target item is not in the vocabulary; they count as misses for every ranking."""
    time_blind: Metrics
    time_given: Metrics | None
    """Metrics with the time of the request; None if the release has no read-out."""
    popularity: Metrics
    p90_coverage10: float
    interest_entropy50: float | None
    """Mean interest entropy of the top 50; None without interests."""


def evaluate_queries(
    release: Release, log: ActionLog, name: str, queries: Queries, options: EvaluationOptions
) -> Evaluation:
    """Evaluate a release on one set of queries. Raises `LogError` if it knows none of the target items."""
    model, items = release.model, known_items(release.model)
    candidates = None
    if options.candidates and options.candidates < len(items):
        candidates = np.random.default_rng(options.seed).permutation(len(items))[: options.candidates]
    evaluator = NextItemEvaluator(
        log, release.vocabularies, queries, mask_seen=options.mask_seen, candidates=candidates
    )
    if not evaluator.known.any():
        raise LogError(f"the release has none of the {len(queries):,} target items: is this the log of its items?")
    users = log.user_of_row[queries.target]
    vectors = evaluator.query_vectors(model)  # [K, E]
    time_given, entropy = None, None
    if model.config.read_out:
        time_given = Metrics.of(evaluator.encoder_scores(model, time_given=True), users, options.seed)
    if options.interests is not None:
        top = evaluator.top_items(vectors, items, min(INTEREST_TOP, len(items)))
        entropy = float(interest_entropy(top, options.interests).mean())
    return Evaluation(
        name=name,
        questions=len(queries),
        unknown=int(np.count_nonzero(~evaluator.known)),
        time_blind=Metrics.of(evaluator.scores(vectors, items), users, options.seed),
        time_given=time_given,
        popularity=Metrics.of(evaluator.popularity_scores(), users, options.seed),
        p90_coverage10=p90_coverage(evaluator.top_items(vectors, items, min(10, len(items))), items=len(items)),
        interest_entropy50=entropy,
    )


def read_interests(path: Path, vocabularies: Vocabularies) -> I64:
    """Return the interest [I] of each known item from a CSV with the columns `item_id` and `interest`.

    Interests are numbered from 1; items that are not in the file get 0. Raises `LogError`.
    """
    try:
        table = pyarrow.csv.read_csv(path)
        keys = [item_key(str(value)) for value in table["item_id"].to_pylist()]
        names = [str(value) for value in table["interest"].to_pylist()]
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        detail = " ".join(str(error).split())
        raise LogError(
            f"interests cannot be read: {path} ({detail}); it needs the columns item_id, interest"
        ) from error
    number = {name: index for index, name in enumerate(sorted(set(names)), start=1)}
    by_key = dict(zip(keys, names, strict=True))
    known: Sequence[int] = vocabularies.item_keys.tolist()
    return np.array([number[by_key[key]] if key in by_key else 0 for key in known], np.int64)
