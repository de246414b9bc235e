"""Evaluation against simple references: embeddings one by one, ranks by sorting, newest rows by a search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from encoder.data.log import DAY_MS, ActionLog, LogError
from encoder.data.split import SplitConfig, make_split
from encoder.evaluation.evaluate import EvaluationOptions, evaluate_queries
from encoder.evaluation.freshness import STALENESS_MS, FreshnessOptions, freshness_table, session_starts_ms
from encoder.evaluation.next_item import MISSED, NextItemEvaluator
from encoder.evaluation.protocols import leave_one_out, rolling
from encoder.evaluation.queries import NewestRows, embeddings_after
from encoder.evaluation.ranking import target_ranks
from encoder.features import UNKNOWN, Vocabularies
from encoder.items import TrainedItems
from encoder.model import EncoderConfig, build_encoder, initialize
from encoder.release import Release, make_release
from encoder.training.run import train_release
from tests.unit.encoder.walks import START_MS, small_recipe, walks

SEED = 20_260_603
STREAMING = EncoderConfig(
    d_model=16, heads=2, kv_heads=1, windows=(4, 3), embedding_dim=8, item_dim=8, sequence_length=8, read_out=True
)
WINDOW = EncoderConfig(
    "window", d_model=16, heads=2, kv_heads=2, windows=(6, 6), embedding_dim=8, item_dim=8, sequence_length=6,
    time_bias=False,
)  # fmt: skip


def untrained(config: EncoderConfig, vocabularies: Vocabularies) -> Release:
    """Return a release with random weights, including those that are initialized to zero."""
    model = build_encoder(config, TrainedItems(len(vocabularies.item_keys), config.item_dim), actions=1, surfaces=0)
    generator = torch.Generator().manual_seed(SEED)
    initialize(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return make_release(model, vocabularies, metrics={}, training={})


@pytest.mark.parametrize("config", [STREAMING, WINDOW], ids=["streaming", "window"])
def test_embeddings_of_many_rows_equal_each_alone(config: EncoderConfig) -> None:
    """Computed together and in any order, each embedding equals that of the last M actions up to its row alone."""
    log = walks(SEED, users=6, length=25)
    release = untrained(config, log.vocabularies())
    tokens = log.tokens(release.vocabularies)
    rows = np.random.default_rng(SEED).permutation(len(log))[:40]
    together = embeddings_after(release.model, tokens, log.starts, rows)
    for place, row in enumerate(rows.tolist()):
        first = max(int(log.starts[log.user_of_row[row]]), row + 1 - config.sequence_length)
        features = tokens.features(np.arange(first, row + 1)[None])
        alone = release.model.embed(features, torch.tensor([row + 1 - first]))[0]
        assert torch.allclose(together[place], alone, atol=1e-5)


def test_ranks_are_those_of_sorting() -> None:
    """Ranks with and without masked items and candidates equal a count over the competing scores."""
    rng = np.random.default_rng(SEED)
    queries, items = torch.randn(9, 4), torch.randn(30, 4)
    targets = rng.integers(0, 30, 9)
    masked = (np.repeat(np.arange(9), 5), rng.integers(0, 30, 45))
    candidates = rng.permutation(30)[:12]
    scores = (queries @ items.T).numpy()
    for mask, among in [(None, None), (masked, None), (None, candidates), (masked, candidates)]:
        found = target_ranks(queries, items, targets, mask, among)
        for q in range(9):
            competing = set(range(30) if among is None else among.tolist()) - {int(targets[q])}
            competing -= set() if mask is None else set(mask[1][mask[0] == q].tolist())
            assert found[q] == sum(scores[q, i] >= scores[q, targets[q]] for i in competing)


def test_an_unknown_target_is_a_miss() -> None:
    """Queries whose target is outside the vocabulary are kept and count as misses."""
    log = walks(SEED)
    known = log.vocabularies()
    half = Vocabularies(known.item_keys[::2], known.actions, known.surfaces)
    queries = make_split(log, SplitConfig("leave_one_out"), seed=1).test
    evaluator = NextItemEvaluator(log, half, queries, mask_seen=False)
    scores = evaluator.encoder_scores(untrained(STREAMING, half).model)
    unknown = half.item_rows(log.actions["item"][queries.target]) == UNKNOWN
    assert unknown.any()
    assert (scores.ranks[unknown] == MISSED).all()
    assert (scores.ranks[~unknown] < len(half.item_keys)).all()


def test_popularity_is_the_count_of_seven_days() -> None:
    """The rank by popularity equals a count over the seven days before the target's day, without seen items."""
    log = walks(SEED, users=20, length=30)
    vocabularies = log.vocabularies()
    queries = make_split(log, SplitConfig("leave_one_out"), seed=1).test
    evaluator = NextItemEvaluator(log, vocabularies, queries, mask_seen=True)
    ranks = evaluator.popularity_scores().ranks
    item, day = vocabularies.item_rows(log.actions["item"]), log.actions["timestamp_ms"] // DAY_MS
    for query, (newest, target) in enumerate(zip(queries.newest, queries.target, strict=True)):
        week = item[(day >= day[target] - 7) & (day < day[target])]
        counts = np.bincount(week, minlength=len(vocabularies.item_keys) + 1)
        seen = set(item[log.starts[log.user_of_row[newest]] : newest + 1].tolist()) | {0, int(item[target])}
        assert ranks[query] == sum(counts[i] >= counts[item[target]] for i in range(len(counts)) if i not in seen)


def test_time_given_scores_need_a_read_out() -> None:
    """Only a release with a read-out has time-given scores, and they differ from the time-blind ones."""
    log = walks(SEED)
    log, queries = leave_one_out(log, items_min=1, queries_max=1_000, seed=1)
    with_read_out = evaluate_queries(
        untrained(STREAMING, log.vocabularies()), log, "all", queries, EvaluationOptions(mask_seen=False)
    )
    without = evaluate_queries(
        untrained(WINDOW, log.vocabularies()), log, "all", queries, EvaluationOptions(mask_seen=False)
    )
    assert without.time_given is None
    assert with_read_out.time_given is not None
    assert with_read_out.time_given != with_read_out.time_blind


def test_newest_rows_equal_a_search() -> None:
    """The newest row before a time equals a search over the user's rows, and is -1 if there is none."""
    log = walks(SEED, users=7, length=9)
    rng = np.random.default_rng(SEED)
    time_ms = log.actions["timestamp_ms"]
    newest = NewestRows(log.starts, time_ms)
    user = rng.integers(0, 7, 200)
    when = np.where(rng.random(200) < 0.5, rng.choice(time_ms, 200), time_ms.min() + rng.integers(-9, 9**8, 200))
    for u, t, row in zip(user, when, newest.before(user, when), strict=True):
        mine = [r for r in range(log.starts[u], log.starts[u + 1]) if time_ms[r] < t]
        assert row == (mine[-1] if mine else -1)


def test_sessions_begin_after_a_gap() -> None:
    """A session begins at a user's first action and after every gap of at least the limit, and nowhere else."""
    starts, time_ms = np.array([0, 4, 4, 6]), np.array([0, 5, 15, 24, 30, 31])
    assert session_starts_ms(starts, time_ms, 10).tolist() == [0, 0, 15, 15, 30, 30]


def test_fresher_embeddings_predict_better_if_the_next_item_follows_the_last(tmp_path: object) -> None:
    """On a circular walk, fresh embeddings predict the next item, and older embeddings predict it less often."""
    log = walks(SEED, users=40, items=60, length=60, follows=0.95)
    release = train_release(
        log,
        small_recipe(budget={"tokens_max": 30_000}),
        out_dir=tmp_path,
        threads=1,  # type: ignore[arg-type]
    )
    table = freshness_table(
        release, log, from_ms=release.training["later_ms"], options=FreshnessOptions(mask_seen=False)
    )
    by_name = {reader.name: reader for reader in table.readers}
    assert list(by_name) == ["once", "daily", "hourly", "per session", "every action", *STALENESS_MS]
    assert by_name["every action"].hr10 > 0.85
    assert by_name["once"].hr10 < by_name["daily"].hr10 < by_name["hourly"].hr10 < by_name["every action"].hr10
    assert by_name["14 days"].hr10 < by_name["6 hours"].hr10 < by_name["1 minute"].hr10
    assert by_name["every action"].behind == 0.0
    assert by_name["once"].behind_interval[0] > 0.1


def test_the_table_queries_only_users_who_had_acted_before() -> None:
    """Users without an action before the table's start have no queries; without any queries there is an error."""
    log = walks(SEED, users=5, length=10)
    release = untrained(STREAMING, log.vocabularies())
    with pytest.raises(LogError, match="before the table's start"):
        freshness_table(release, log, from_ms=START_MS)
    table = freshness_table(
        release, log, from_ms=int(np.median(log.actions["timestamp_ms"])), options=FreshnessOptions(days=400)
    )
    time_ms = log.actions["timestamp_ms"]
    assert table.questions == int((time_ms >= table.from_ms).sum())


def test_a_start_after_the_end_of_the_log_is_an_error() -> None:
    """A start after the end of the log is an error."""
    log: ActionLog = walks(SEED, users=3, length=5)
    with pytest.raises(LogError, match="no action of a known user"):
        rolling(log, from_ms=START_MS + 10**12, spans=2, queries_max=10, seed=1)
