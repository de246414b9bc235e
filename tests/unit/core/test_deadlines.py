"""The deadline wheel: never early, late by less than a bucket, complete, and free while nothing is due."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.core.deadlines import BUCKET_MS, Deadlines


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
