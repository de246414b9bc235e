"""The reference of the recount, tested against the plainest reading of the invariants."""

from __future__ import annotations

import numpy as np
import pytest

from infra.demo.histories import recompute

NO_IDS = np.zeros(6, np.uint64)


def test_plain_appends_are_kept_in_order_of_arrival() -> None:
    """Events of users whose event time never decreases keep their order of arrival."""
    users, times = np.array([1, 0, 1, 1, 0, 1]), np.array([5, 1, 5, 7, 1, 9])
    histories = recompute(3, users, times, NO_IDS, 4)
    assert histories.rows.tolist() == [1, 4, 0, 2, 3, 5]
    assert histories.counts.tolist() == [2, 4, 0]
    assert histories.last_rows.tolist() == [4, 5, -1]


def test_a_late_event_is_placed_by_its_event_time() -> None:
    """A late event is placed by event time, and is still the last one applied."""
    users, times = np.zeros(4, np.int64), np.array([10, 30, 30, 20])
    histories = recompute(1, users, times, NO_IDS[:4], 8)
    assert histories.rows.tolist() == [0, 3, 1, 2]
    assert histories.last_rows.tolist() == [3]


def test_a_late_event_older_than_a_full_sequence_is_dropped() -> None:
    """An event older than everything in a full sequence is not applied; with room left it is."""
    users, times = np.zeros(4, np.int64), np.array([10, 20, 30, 5])
    assert recompute(1, users, times, NO_IDS[:4], 3).rows.tolist() == [0, 1, 2]
    assert recompute(1, users, times, NO_IDS[:4], 4).rows.tolist() == [3, 0, 1, 2]


def test_an_event_id_among_the_kept_ones_is_applied_once() -> None:
    """A repeated event id of one user counts once while the first is kept; the id of another user does not matter."""
    users, times = np.array([0, 0, 1, 0, 0]), np.array([1, 2, 2, 3, 4])
    ids = np.array([7, 8, 7, 7, 8], np.uint64)
    histories = recompute(2, users, times, ids, 2)
    assert histories.counts.tolist() == [2, 1]
    kept_for_one = recompute(2, users, times, ids, 1)
    assert kept_for_one.counts.tolist() == [4, 1]


def test_all_users_at_once_equal_each_user_alone() -> None:
    """Histories of many users at once equal those of each user processed event by event."""
    seed = 77
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    users, times = rng.integers(0, 20, 600), np.sort(rng.integers(0, 300, 600))
    late = rng.random(600) < 0.05
    times = np.where(late, times - 40, times)
    together = recompute(20, users, times, np.zeros(600, np.uint64), 12)
    for user in range(20):
        mine = np.flatnonzero(users == user)
        kept: list[tuple[int, int]] = []
        for row in mine.tolist():
            window = sorted(kept)[-12:]
            if len(window) == 12 and times[row] < window[0][0]:
                continue
            kept.append((int(times[row]), row))
        expected = [row for _, row in sorted(kept)]
        assert together.rows[together.starts[user] : together.starts[user + 1]].tolist() == expected


@pytest.mark.parametrize("length_max", [1, 3])
def test_no_events_make_no_histories(length_max: int) -> None:
    """An empty input gives empty histories and no last row."""
    empty = np.zeros(0, np.int64)
    histories = recompute(2, empty, empty, np.zeros(0, np.uint64), length_max)
    assert histories.counts.tolist() == [0, 0]
    assert histories.last_rows.tolist() == [-1, -1]
