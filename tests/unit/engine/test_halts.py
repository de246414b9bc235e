"""Halted partitions: their reasons, the delays between attempts, and when nothing is left to go on with."""

from __future__ import annotations

from streams.engine.halts import RETRY_FIRST_S, RETRY_MAX_S, Halts


def test_a_reason_is_reported_once_and_ends() -> None:
    """A repeated reason is not new, another one is, and an ended halt is gone."""
    halts = Halts()
    assert [halts.begin(3, reason) for reason in ("no leader", "no leader", "no disk")] == [True, False, True]
    assert halts.copy() == {3: "no disk"}
    assert [halts.end(3), halts.end(3)] == [True, False]
    assert not halts


def test_delays_grow_up_to_a_bound_until_the_partition_moves() -> None:
    """Failures in a row double the delay of their partition only; progress and a new assignment reset it."""
    halts = Halts()
    delays = [halts.next_retry_s(1) for _ in range(8)]
    assert delays[:3] == [RETRY_FIRST_S, 2 * RETRY_FIRST_S, 4 * RETRY_FIRST_S]
    assert delays[-1] == RETRY_MAX_S
    assert halts.next_retry_s(2) == RETRY_FIRST_S
    halts.note_progress(1)
    assert halts.next_retry_s(1) == RETRY_FIRST_S
    halts.clear()
    assert halts.next_retry_s(1) == RETRY_FIRST_S


def test_a_worker_has_nothing_left_only_when_every_partition_is_refused() -> None:
    """Halts that may end by themselves and partitions that go on keep a worker alive."""
    halts, assigned = Halts(), frozenset({0, 1})
    halts.begin(0, "lost records", refused=True)
    halts.begin(1, "disk full")
    assert not halts.refuse_all(assigned)
    halts.begin(1, "lost records", refused=True)
    assert halts.refuse_all(assigned)
    halts.end(1)
    assert not halts.refuse_all(assigned)
    assert not Halts().refuse_all(frozenset())
