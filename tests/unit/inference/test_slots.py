"""The slot table: least recently used goes first, and a slot never claims what was not written."""

from __future__ import annotations

import numpy as np
import pytest

from encoder.inference.slots import SlotTable


def sealed(table: SlotTable, users: list[bytes], count: int = 1) -> np.ndarray:
    """Take slots for users and record that they hold `count` actions."""
    slots = table.take(users)
    ones = np.ones(len(slots), np.int64)
    table.seal(slots, count * ones, 0 * ones, 0 * ones)
    return slots


def test_the_least_recently_used_user_gives_way() -> None:
    """A user that was used since is kept; the one that waited longest loses its slot and its count."""
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
    """A newcomer that precedes an old user in one batch takes somebody else's slot."""
    table = SlotTable(2)
    a, _ = sealed(table, [b"a", b"b"])
    slots = table.take([b"c", b"a"])
    assert slots[1] == a
    assert table.counts[a] == 1


def test_open_slots_hold_nothing() -> None:
    """Between open and seal a slot claims nothing, so a step that fails half-way costs a recomputation only."""
    table = SlotTable(1)
    slots = sealed(table, [b"a"], count=5)
    table.open(slots)
    assert table.counts[table.take([b"a"])].tolist() == [0]


def test_forget_and_clear_free_slots() -> None:
    """Forgotten users own nothing, unknown ones are ignored, and their slots serve others without an eviction."""
    table = SlotTable(2)
    sealed(table, [b"a", b"b"])
    table.forget([b"a", b"nobody"])
    assert len(table) == 1
    table.clear()
    assert len(table) == 0
    assert table.counts[sorted(table.take([b"c", b"d"]))].tolist() == [0, 0]
    assert table.evictions == 0


def test_no_slot_is_an_error() -> None:
    """A table without slots is refused."""
    with pytest.raises(ValueError, match="no room for a single user"):
        SlotTable(0)
