"""The comparison of readers equals the obvious way of computing it."""

from __future__ import annotations

import numpy as np

from infra.demo.recall import (
    DAY_MS,
    TOP,
    WEEK_MS,
    Acts,
    Publications,
    SeenItems,
    held,
    hits,
    last_midnight_ms,
    popularity_hits,
)

SEED = 20_240_601
ITEMS = 40


def _acts(rng: np.random.Generator, count: int) -> Acts:
    time_ms = np.sort(rng.integers(20 * DAY_MS, 40 * DAY_MS, count)) // 1_000 * 1_000
    return Acts(rng.integers(0, 5, count), rng.integers(-1, ITEMS, count), time_ms)


def _seen_before(log: Acts, user: int, time_ms: int) -> set[int]:
    rows = (log.user == user) & (log.time_ms < time_ms) & (log.item >= 0)
    return set(log.item[rows].tolist())


def _is_hit(scores: np.ndarray, target: int, seen: set[int]) -> bool:
    if target < 0 or target in seen:
        return False
    others = [score for item, score in enumerate(scores.tolist()) if item != target and item not in seen]
    return bool(sum(score >= scores[target] for score in others) < TOP)


def test_held_is_the_newest_publication_strictly_before_the_time() -> None:
    """A reader at time t has the last embedding of its user with an event time below t, never another user's."""
    publications = Publications(np.array([3, 3, 7, 3]), np.array([100, 200, 150, 200]), np.zeros((4, 2), np.float32))
    users = np.array([3, 3, 3, 3, 7, 5, 7])
    before_ms = np.array([100, 101, 200, 201, 151, 500, 150])
    assert held(publications, users, before_ms).tolist() == [-1, 0, 0, 3, 2, -1, -1]


def test_without_publications_no_reader_has_an_embedding() -> None:
    """Without publications every reader has index -1."""
    nothing = Publications(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 2), np.float32))
    assert held(nothing, np.array([0, 1]), np.array([5, 5])).tolist() == [-1, -1]


def test_last_midnight_is_utc_and_includes_midnight_itself() -> None:
    """An action at midnight uses the batch of that midnight, which contains everything before it."""
    times = np.array([3 * DAY_MS, 3 * DAY_MS - 1, 3 * DAY_MS + 5])
    assert last_midnight_ms(times).tolist() == [3 * DAY_MS, 2 * DAY_MS, 3 * DAY_MS]


def test_seen_items_are_those_of_strictly_earlier_actions_each_once() -> None:
    """Actions of the same time do not count, a repeated item counts once, other users' items do not count."""
    log = Acts(np.array([0, 0, 0, 1, 0]), np.array([4, 4, 9, 5, -1]), np.array([10, 20, 30, 5, 6]))
    query, item = SeenItems(log).before(np.array([0, 0, 1]), np.array([30, 31, 5]))
    assert sorted(zip(query.tolist(), item.tolist(), strict=True)) == [(0, 4), (1, 4), (1, 9)]


def test_hits_equal_the_obvious_ranking() -> None:
    """Counting the scores that reach the target's equals ranking the unseen items, one action at a time."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    log = _acts(rng, 700)
    vectors = rng.standard_normal((30, 8)).astype(np.float32)
    items = rng.standard_normal((ITEMS, 8)).astype(np.float32)
    chosen = rng.integers(-1, len(vectors), len(log))
    expected = [
        row >= 0 and _is_hit(items @ vectors[row], target, _seen_before(log, user, time_ms))
        for row, target, user, time_ms in zip(
            chosen.tolist(), log.item.tolist(), log.user.tolist(), log.time_ms.tolist(), strict=True
        )
    ]
    result = hits(log, chosen, vectors, items, SeenItems(log))
    assert result.tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_a_tie_is_a_miss() -> None:
    """An embedding that gives every item the same score has no hit among more than ten items."""
    act = Acts(np.array([0]), np.array([0]), np.array([10]))
    flat = np.zeros((1, 2), np.float32)
    assert not hits(act, np.array([0]), flat, np.ones((TOP + 1, 2), np.float32), SeenItems(act))[0]
    assert hits(act, np.array([0]), flat, np.ones((TOP, 2), np.float32), SeenItems(act))[0]


def test_popularity_equals_counting_the_week_before_each_action() -> None:
    """Running counts equal counting the seven days before each action, with older actions as tie-breakers."""
    print(f"seed {SEED}")
    log = _acts(np.random.default_rng(SEED), 900)
    newer = Acts(log.user[400:], log.item[400:], log.time_ms[400:])
    is_older = log.time_ms < newer.time_ms[0]
    older = np.bincount(log.item[is_older & (log.item >= 0)], minlength=ITEMS)
    expected = []
    for user, target, time_ms in zip(newer.user.tolist(), newer.item.tolist(), newer.time_ms.tolist(), strict=True):
        in_week = (log.time_ms < time_ms) & (log.time_ms >= time_ms - WEEK_MS) & (log.item >= 0)
        scores = np.bincount(log.item[in_week], minlength=ITEMS) + older / (older.sum() + 1)
        expected.append(_is_hit(scores, target, _seen_before(log, user, time_ms)))
    result = popularity_hits(newer, log, ITEMS, SeenItems(log))
    assert result.tolist() == expected
    assert 0 < sum(expected) < len(expected)
