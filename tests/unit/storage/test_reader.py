"""Sequences survive the way from memory through snapshot, codec and store back to memory unchanged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.core.layout import StateLimits
from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.storage.codec import CorruptValue, LayoutChanged, chunk_key, encode, head_key
from streams.storage.memory_store import MemoryStore
from streams.storage.reader import read_users
from tests.unit.core.build import LIMITS, batch, state_of

USERS = [b"a", b"b"]
POLICY = TriggerPolicy(every_n=100)
NOW_MS = 1_000_000


def _write(state: PartitionState, store: MemoryStore) -> int:
    snapshot = state.begin_checkpoint()
    records = encode(snapshot, LIMITS)
    store.write(records, 0)
    state.commit_checkpoint(snapshot)
    return len(records)


@settings(max_examples=150)
@given(
    rounds=st.lists(
        st.lists(st.tuples(st.sampled_from(USERS), st.integers(0, 60), st.integers(0, 19)), max_size=12), max_size=8
    )
)
def test_reading_yields_what_is_in_memory(rounds: list[list[tuple[bytes, int, int]]]) -> None:
    """After any appends, late events and tombstones, the store holds exactly what memory holds at each checkpoint."""
    state, store, offset = state_of(POLICY, USERS), MemoryStore(), 0
    for number, events in enumerate(rounds):
        if events:
            users, times, kinds = map(list, zip(*events, strict=True))
            tombstones = [kind == 0 for kind in kinds]
            times = [time_ms + 10 * number for time_ms in times]
            state.apply(batch(users, times, offset=offset, tombstones=tombstones), NOW_MS)
            offset += len(events)
        _write(state, store)
        read = read_users(store, USERS, LIMITS)
        rows = state._sequences.rows_of(USERS)
        actions, starts = state._sequences.kept(rows)
        assert not read.corrupt
        assert read.stored.actions.tolist() == actions.tolist()
        assert read.stored.starts.tolist() == starts.tolist()
        for column in ("count", "revision", "applied_offset", "forgotten_ms", "due_ms", "unencoded"):
            assert read.stored.headers[column].tolist() == state._sequences.headers[column][rows].tolist()


def test_one_new_action_rewrites_only_the_head() -> None:
    """Each new action of a user with a full sequence costs one head, and every C of them one chunk."""
    state, store, length = state_of(POLICY, [b"a"]), MemoryStore(), LIMITS.sequence_length
    state.apply(batch([b"a"] * length, range(length)), NOW_MS)
    assert _write(state, store) == 1 + length // LIMITS.chunk_length
    written = []
    for offset in range(length, length + 4):
        state.apply(batch([b"a"], [offset], offset=offset), NOW_MS)
        written.append(_write(state, store))
    assert written == [1, 2, 1, 2]


def test_late_event_rewrites_the_chunks_behind_it() -> None:
    """An event in the middle rewrites its own chunk and all later ones, and no earlier one."""
    state, store = state_of(POLICY, [b"a"]), MemoryStore()
    state.apply(batch([b"a"] * 6, [0, 10, 20, 30, 40, 50]), NOW_MS)
    _write(state, store)
    state.apply(batch([b"a"], [25], offset=6), NOW_MS)
    assert state.begin_checkpoint().chunk_numbers.tolist() == [1, 2]


def test_nothing_of_a_forgotten_user_stays_in_the_store() -> None:
    """After a tombstone the store has no earlier action of the user, with or without later actions."""
    state, store = state_of(POLICY, [b"a"]), MemoryStore()
    state.apply(batch([b"a"] * 7, range(7)), NOW_MS)
    _write(state, store)
    state.apply(batch([b"a"], [50], offset=7, tombstones=[True]), NOW_MS)
    _write(state, store)
    assert [key for key in store.records if key[:1] == b"c"] == []
    assert read_users(store, [b"a"], LIMITS).stored.actions.tolist() == []
    state.apply(batch([b"a"] * 3, [60, 61, 62], offset=8), NOW_MS)
    _write(state, store)
    state.apply(batch([b"a"] * 2, [70, 71], offset=11, tombstones=[True, False]), NOW_MS)
    _write(state, store)
    assert [key for key in store.records if key[:1] == b"c"] == []
    assert read_users(store, [b"a"], LIMITS).stored.actions["timestamp_ms"].tolist() == [71]


def test_corrupt_user_is_reported_and_the_others_are_read() -> None:
    """A corrupt head or chunk affects only its user, who is reported and gets an empty state."""
    state, store = state_of(POLICY, USERS), MemoryStore()
    state.apply(batch([b"a", b"a", b"a", b"b"], [1, 2, 3, 4]), NOW_MS)
    _write(state, store)
    for key in (head_key(b"a"), chunk_key(b"a", 0, LIMITS)):
        intact = store.records[key]
        store.records[key] = intact[:-1] + bytes([intact[-1] ^ 1])
        read = read_users(store, USERS, LIMITS)
        assert list(read.corrupt) == [b"a"]
        assert isinstance(read.corrupt[b"a"], CorruptValue)
        assert read.stored.headers["count"].tolist() == [0, 1]
        assert read.stored.starts.tolist() == [0, 0, 1]
        store.records[key] = intact
    assert not read_users(store, USERS, LIMITS).corrupt


def test_state_of_other_sizes_is_not_read() -> None:
    """State written with another chunk length raises for every user."""
    state, store = state_of(POLICY, [b"a"]), MemoryStore()
    state.apply(batch([b"a"], [1]), NOW_MS)
    _write(state, store)
    with pytest.raises(LayoutChanged):
        read_users(store, [b"a"], StateLimits(sequence_length=8, chunk_length=4))


def test_reading_no_users() -> None:
    """Reading an empty list of users yields empty columns."""
    read = read_users(MemoryStore(), [], LIMITS)
    assert (len(read.stored.headers), read.stored.starts.tolist()) == (0, [0])
    assert np.array_equal(read.stored.actions, read.stored.actions[:0])
