"""Splits and batches: targets are never trained on, and everything else is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from encoder.data.batches import epoch_batches
from encoder.data.log import ActionLog
from encoder.data.split import Queries, Split, SplitConfig, make_split
from encoder.evaluation.protocols import rolling
from encoder.training.recipe import DataConfig
from tests.unit.encoder.walks import START_MS, walks

SEED = 20_260_601


def identities(log: ActionLog, rows: np.ndarray) -> set[tuple[str, int, int]]:
    """Return (user, time, item) of rows; unique in these logs, because the times of a user differ."""
    users = log.users[log.user_of_row[rows]]
    return set(zip(users.tolist(), log.actions["timestamp_ms"][rows].tolist(), log.actions["item"][rows].tolist()))  # noqa: B905


@pytest.mark.parametrize("kind", ["last", "leave_one_out", "time"])
def test_no_target_is_trained_on(kind: str) -> None:
    """The training part contains no target of validation or test, and nothing else is missing from it."""
    log = walks(SEED)
    split = make_split(log, SplitConfig(kind), seed=1)  # type: ignore[arg-type]
    trained = identities(split.train, np.arange(len(split.train)))
    targets = identities(split.log, np.concatenate([split.validation.target, split.test.target]))
    assert len(targets) > 3
    assert not trained & targets
    everything = identities(split.log, np.arange(len(split.log)))
    if kind != "time":
        assert trained | targets == everything


def test_leave_one_out_takes_the_last_action_and_the_one_before() -> None:
    """Each user's last action is the test target, the one before it the validation target."""
    log = walks(SEED)
    split = make_split(log, SplitConfig("leave_one_out"), seed=1)
    assert split.test.target.tolist() == (log.starts[1:] - 1).tolist()
    assert split.validation.target.tolist() == (log.starts[1:] - 2).tolist()
    assert (split.test.newest == split.test.target - 1).all()


def test_a_split_by_time_trains_on_older_actions_only() -> None:
    """Every training action is older than every validation target, and those are older than every test target."""
    log = walks(SEED)
    split = make_split(log, SplitConfig("time"), seed=1)
    time_ms = split.log.actions["timestamp_ms"]
    assert split.train.actions["timestamp_ms"].max() < time_ms[split.validation.target].min()
    assert time_ms[split.validation.target].max() < split.unseen_from_ms <= time_ms[split.test.target].min()


@pytest.mark.parametrize("kind", ["last", "leave_one_out", "time"])
def test_held_out_users_are_not_trained_on(kind: str) -> None:
    """With `held_users`, queries and training come from disjoint sets of users, and neither set is empty."""
    log = walks(SEED, users=60)
    split = make_split(log, SplitConfig(kind, validation=0.3, held_users=0.3), seed=1)  # type: ignore[arg-type]
    user = split.log.user_of_row
    queried = set(user[np.concatenate([split.validation.target, split.test.target])].tolist())
    trained = set(split.train.user_of_row.tolist())
    assert len(queried) > 3
    assert len(trained) > 30
    assert not queried & trained


def test_rare_items_are_dropped_before_the_split() -> None:
    """With `items_min`, neither queries nor training contain items that occur less often in the whole log."""
    log = walks(SEED, follows=0.5)
    keys, counts = np.unique(log.actions["item"], return_counts=True)
    least = int(np.median(counts))
    split = make_split(log, SplitConfig("leave_one_out", items_min=least), seed=1)
    assert set(split.log.actions["item"].tolist()) == set(keys[counts >= least].tolist())


def test_rolling_queries_see_nothing_of_their_own_second() -> None:
    """The newest action of a rolling query is strictly older than its target and of the same user."""
    log = walks(SEED)
    same = log.actions.copy()
    same["timestamp_ms"] = same["timestamp_ms"] // 3_600_000 * 3_600_000  # many actions of one user share a time
    burst = ActionLog(log.users, log.starts, same, log.action_names, log.surface_names, log.item_ids)
    parts = rolling(burst, from_ms=START_MS + 86_400_000, spans=3, queries_max=10_000, seed=1)
    time_ms, user = burst.actions["timestamp_ms"], burst.user_of_row
    assert len(parts) == 3
    for _, queried in parts:
        assert (time_ms[queried.newest] < time_ms[queried.target]).all()
        assert (user[queried.newest] == user[queried.target]).all()
        between = [time_ms[a + 1 : b].tolist() for a, b in zip(queried.newest, queried.target, strict=True)]
        assert all(value == time_ms[b] for values, b in zip(between, queried.target, strict=True) for value in values)
    ends = [time_ms[part.target] for _, part in parts]
    assert all(earlier.max() < later.min() for earlier, later in itertools.pairwise(ends))


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_epoch_reads_every_action_once(ranks: int) -> None:
    """The batches of one epoch contain each row once; those of two processes are disjoint and miss few rows."""
    log = walks(SEED)
    config = DataConfig(chunk=20, batch_tokens=400)
    rows: list[int] = []
    for rank in range(ranks):
        rng = np.random.default_rng([SEED, 3])
        for matrix in epoch_batches(log.starts, config, rng, rank=rank, ranks=ranks):
            assert matrix.size <= 400 + 20 * 16
            rows += matrix[matrix >= 0].tolist()
    assert len(rows) == len(set(rows))
    assert len(rows) == len(log) if ranks == 1 else len(rows) >= len(log) - 400


def test_a_select_keeps_each_user_s_rows() -> None:
    """Selecting rows equals filtering the list of every user."""
    log = walks(SEED, users=5, length=8)
    chosen = np.random.default_rng(SEED).random(len(log)) < 0.5
    kept = log.select(chosen)
    for user, (first, last) in enumerate(itertools.pairwise(log.starts.tolist())):
        mine = log.actions[first:last][chosen[first:last]]
        assert np.array_equal(kept.actions[kept.starts[user] : kept.starts[user + 1]], mine)


def test_known_queries_have_a_target_in_the_vocabulary() -> None:
    """`known` keeps exactly the queries whose target item is in the vocabulary."""
    log = walks(SEED, users=6, length=6)
    vocabularies = log.vocabularies()
    split: Split = make_split(log, SplitConfig("leave_one_out"), seed=1)
    fewer = type(vocabularies)(vocabularies.item_keys[:10], vocabularies.actions, vocabularies.surfaces)
    known: Queries = split.test.known(log, fewer)
    assert set(log.actions["item"][known.target].tolist()) <= set(fewer.item_keys.tolist())
    assert len(known) < len(split.test)
