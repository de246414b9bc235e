"""The slot table evicts the least recently used user, and a slot never claims what was not written."""

from __future__ import annotations

import numpy as np
import pytest

from encoder.inference.slots import SlotTable


def sealed(table: SlotTable, users: list[bytes], count: int = 1) -> np.ndarray:
    """Take slots for users, record that they hold `count` actions, and return them."""
    slots = table.take(users)
    ones = np.ones(len(slots), np.int64)
    table.seal(slots, count * ones, 0 * ones, 0 * ones)
    return slots


def test_the_least_recently_used_user_is_evicted() -> None:
    """A user that was used since is kept; the least recently used one loses its slot and its count."""
    table = SlotTable(2)
    a, b = sealed(table, [b"a", b"b"])
    sealed(table, [b"a"])
    (c,) = table.take([b"c"])
    assert c == b
    assert table.counts[c] == 0
    assert table.take([b"a"])[0] == a
    assert table.counts[a] == 1
    assert table.evictions == 1


def test_a_user_of_the_batch_is_not_evicted_by_the_batch() -> None:
    """A new user that precedes a cached one in a batch takes the slot of a user outside the batch."""
    table = SlotTable(2)
    a, _ = sealed(table, [b"a", b"b"])
    slots = table.take([b"c", b"a"])
    assert slots[1] == a
    assert table.counts[a] == 1


def test_open_slots_hold_nothing() -> None:
    """Between open and seal a slot claims nothing, so a pass that fails half-way only costs a recomputation."""
    table = SlotTable(1)
    slots = sealed(table, [b"a"], count=5)
    table.open(slots)
    assert table.counts[table.take([b"a"])].tolist() == [0]


def test_forget_and_clear_free_slots() -> None:
    """Forgotten users own no slot, unknown users are ignored, and freed slots are reused without an eviction."""
    table = SlotTable(2)
    sealed(table, [b"a", b"b"])
    table.forget([b"a", b"nobody"])
    assert len(table) == 1
    table.clear()
    assert len(table) == 0
    assert table.counts[sorted(table.take([b"c", b"d"]))].tolist() == [0, 0]
    assert table.evictions == 0


def test_no_slot_is_an_error() -> None:
    """A table without slots is rejected."""
    with pytest.raises(ValueError, match="no room for a single user"):
        SlotTable(0)
