"""The deadline wheel: never early, late by less than a bucket, complete, and free while nothing is due."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.core.deadlines import BUCKET_MS, NO_BUCKET, SWEEP_ABOVE, Deadlines


@settings(max_examples=200)
@given(due_ms=st.lists(st.integers(0, 3_000), max_size=80), tick_ms=st.integers(1, 250), limit=st.integers(1, 30))
def test_every_entry_is_popped_on_time(due_ms: list[int], tick_ms: int, limit: int) -> None:
    """Each entry is popped exactly once, not before its deadline and less than a bucket and a tick after it."""
    wheel = Deadlines()
    wheel.add(np.arange(len(due_ms)), np.array(due_ms, np.int64))
    wheel.add_cold([b"%d" % index for index in range(len(due_ms))], np.array(due_ms, np.int64))
    hot: list[int] = []
    cold: list[int] = []
    for now_ms in range(0, 3_000 + BUCKET_MS + tick_ms, tick_ms):
        while wheel.next_ms is not None and wheel.next_ms <= now_ms:
            rows, users = wheel.pop(now_ms, limit)
            assert len(users) <= limit
            hot += rows.tolist()
            cold += map(int, users)
            for index in [*rows.tolist(), *map(int, users)]:
                assert due_ms[index] <= now_ms < due_ms[index] + BUCKET_MS + tick_ms
    assert sorted(hot) == sorted(cold) == list(range(len(due_ms)))
    assert wheel.next_ms is None


def test_a_million_pending_are_exact_and_cost_nothing_while_not_due() -> None:
    """A million pending users cost microseconds per look at the wheel, and those due are popped in their bucket."""
    wheel = Deadlines()
    rng = np.random.default_rng(3)
    due_ms = rng.integers(10_000, 3_600_000, 1_000_000)
    wheel.add_cold([b"%d" % index for index in range(len(due_ms))], due_ms)
    began = time.thread_time()
    for now_ms in range(1_000):
        assert wheel.next_ms is not None
        assert wheel.next_ms > now_ms
    assert time.thread_time() - began < 0.1
    _, users = wheel.pop(60_000, 10**9)
    assert sorted(map(int, users)) == np.flatnonzero(due_ms <= 60_000).tolist()


def test_users_that_come_and_go_leave_one_entry_each() -> None:
    """Ten minutes of 1,000 evictions per second of the same 10,000 users, due a day later, are 10,000 entries."""
    wheel, users = Deadlines(), [b"%d" % index for index in range(10_000)]
    day_ms, most = 24 * 3_600_000, 0
    for second in range(600):
        chosen = users[second * 1_000 % 10_000 :][:1_000]
        wheel.add_cold(chosen, np.full(1_000, second * 1_000 + day_ms))
        wheel.add(np.arange(1_000), np.full(1_000, second * 1_000 + day_ms))
        most = max(most, len(wheel))
    assert most == 11_000
    _, popped = wheel.pop(2 * day_ms, 10**9)
    assert sorted(popped) == sorted(users)
    assert (len(wheel), wheel.next_ms) == (0, None)


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32))
def test_deadlines_that_move_in_both_directions_stay_bounded_and_fire(seed: int) -> None:
    """Entries stay below twice the users, however often deadlines move; each is looked at by its earliest deadline."""
    rng, wheel, users, now_ms = np.random.default_rng(seed), Deadlines(), 40, 0
    pending = np.full(2 * users, NO_BUCKET)  # earliest deadline since the last look, rows then cold users
    for _ in range(400):
        chosen = np.unique(rng.integers(0, users, 8))
        due_ms = now_ms + rng.integers(0, 20_000, len(chosen))
        wheel.add(chosen, due_ms)
        wheel.add_cold([b"%d" % index for index in chosen], due_ms)
        for part in (chosen, chosen + users):
            pending[part] = np.minimum(pending[part], due_ms)
        rows, cold = wheel.pop(now_ms, 10**9)
        popped = np.concatenate((rows, users + np.array([int(user) for user in cold], np.int64)))
        assert (pending[popped] <= now_ms).all()
        pending[popped] = NO_BUCKET
        assert (pending > now_ms - BUCKET_MS).all()
        assert len(wheel) <= SWEEP_ABOVE + 2 * 3 * users
        now_ms += int(rng.integers(0, 300))


def test_replaced_entries_are_swept_out() -> None:
    """A user and a row whose deadlines move forward 5,000 times keep the last one, and the wheel stays small."""
    wheel = Deadlines()
    for step in range(5_000, 0, -1):
        wheel.add_cold([b"a"], np.array([step * BUCKET_MS]))
        wheel.add(np.array([3]), np.array([step * BUCKET_MS]))
        assert len(wheel) <= SWEEP_ABOVE + 16
    rows, users = wheel.pop(BUCKET_MS, 10**9)
    assert (rows.tolist(), users) == ([3], [b"a"])
    rows, users = wheel.pop(5_000 * BUCKET_MS, 10**9)
    assert (rows.tolist(), users, len(wheel)) == ([], [], 0)
