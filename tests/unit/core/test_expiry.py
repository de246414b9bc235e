"""Users without an action for the TTL: forgotten by a gap between two actions, and by a look at the clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streams.core.layout import nothing_stored
from streams.core.merge import Outcome
from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.storage.codec import encode, head_key
from streams.storage.memory_store import MemoryStore
from streams.storage.reader import may_be_older, read_users
from tests.unit.core.build import LIMITS, batch, items_of, state_of

TTL_MS = 1_000
NOW_MS = 1_000_000
WITH_TTL = replace(LIMITS, user_ttl_ms=TTL_MS)


def checkpointed(state: PartitionState, store: MemoryStore) -> list[bytes]:
    """Write a checkpoint to the store; return the keys that it deleted."""
    snapshot = state.begin_checkpoint()
    records = encode(snapshot, WITH_TTL)
    store.write(records, 1)
    state.commit_checkpoint(snapshot)
    return [key for key, value in records if value is None]


def reloaded(store: MemoryStore, *users: bytes) -> PartitionState:
    """Return a state after a restart, with these users read from the store."""
    state = PartitionState(TriggerPolicy(), WITH_TTL)
    state.seed_deadlines(store.pending())
    state.load(users, read_users(store, users, WITH_TTL).stored)
    return state


def test_a_user_expires_when_its_newest_action_is_the_ttl_old() -> None:
    """Not a millisecond before; the tombstone has the offset that was given, and other users are left alone."""
    state = state_of(TriggerPolicy(), [b"a", b"b"], WITH_TTL)
    state.apply(batch([b"a", b"a", b"b"], [NOW_MS - 500, NOW_MS, NOW_MS + 1]), NOW_MS)
    assert state.expire([b"a", b"b"], NOW_MS + TTL_MS - 1, 7).expired == []
    effects = state.expire([b"a", b"b"], NOW_MS + TTL_MS, 7)
    assert (effects.expired, effects.forgotten, effects.forgotten_offsets.tolist()) == ([b"a"], [b"a"], [7])
    assert (items_of(state, b"a"), items_of(state, b"b")) == ([], [3])
    assert state.expire([b"a", b"b"], NOW_MS + TTL_MS, 8).expired == []


def test_the_user_of_the_last_record_waits_for_the_next() -> None:
    """Its tombstone would have the offset of its embedding, and would be taken for older than that."""
    state = state_of(TriggerPolicy(), [b"a"], WITH_TTL)
    state.apply(batch([b"a"], [NOW_MS], offset=7), NOW_MS)
    assert state.expire([b"a"], NOW_MS + TTL_MS, 7).expired == []
    assert state.expire([b"a"], NOW_MS + TTL_MS, 8).expired == [b"a"]


def test_nothing_is_left_of_an_expired_user() -> None:
    """Head, chunks and deadline are deleted, and it is not due; a restart finds nothing, and the user starts empty."""
    state, store = state_of(TriggerPolicy(cooldown_ms=10_000), [b"a"], WITH_TTL), MemoryStore()
    state.apply(batch([b"a"] * 5, [NOW_MS] * 5), NOW_MS)
    checkpointed(state, store)
    assert set(store.records) == {b"ua", b"ca\x00", b"ca\x01", b"pa", b"o"}
    state.expire([b"a"], NOW_MS + TTL_MS, 9)
    assert state.begin_job([b"a"]).sequences.users == []
    assert sorted(checkpointed(state, store)) == [b"ca\x00", b"ca\x01", b"ua"]
    assert set(store.records) == {b"o"}
    again = reloaded(store, b"a")
    assert (again.next_deadline_ms, items_of(again, b"a")) == (None, [])
    assert again.apply(batch([b"a"], [NOW_MS + 5_000], offset=10), NOW_MS).due == [b"a"]
    assert items_of(again, b"a") == [11]


def test_a_user_that_acts_before_the_next_checkpoint_keeps_its_head() -> None:
    """The user starts empty under another revision, so nothing that is cached of the old actions is used."""
    state, store = state_of(TriggerPolicy(), [b"a"], WITH_TTL), MemoryStore()
    state.apply(batch([b"a"] * 5, [NOW_MS] * 5), NOW_MS)
    before = state.begin_job([b"a"])
    state.finish_job(before.sequences.users, before.offsets, NOW_MS)
    checkpointed(state, store)
    state.expire([b"a"], NOW_MS + TTL_MS, 9)
    state.apply(batch([b"a"], [NOW_MS + 10], offset=10), NOW_MS)  # late by less than the TTL
    assert sorted(checkpointed(state, store)) == [b"ca\x00", b"ca\x01"]
    again = reloaded(store, b"a")
    assert items_of(again, b"a") == [11]
    assert again.begin_job([b"a"]).sequences.revisions.tolist() == [before.sequences.revisions[0] + 1]


def test_an_aborted_checkpoint_is_repeated_with_the_deletions() -> None:
    """What may not be durable is deleted by the next one."""
    state, store = state_of(TriggerPolicy(), [b"a"], WITH_TTL), MemoryStore()
    state.apply(batch([b"a"] * 5, [NOW_MS] * 5), NOW_MS)
    checkpointed(state, store)
    state.expire([b"a"], NOW_MS + TTL_MS, 9)
    state.abort_checkpoint(state.begin_checkpoint())
    assert sorted(checkpointed(state, store)) == [b"ca\x00", b"ca\x01", b"ua"]


def test_an_embedding_on_its_way_is_dropped() -> None:
    """A job that began before the expiry publishes nothing after the tombstone."""
    state = state_of(TriggerPolicy(), [b"a"], WITH_TTL)
    state.apply(batch([b"a"], [NOW_MS]), NOW_MS)
    job = state.begin_job([b"a"])
    state.expire([b"a"], NOW_MS + TTL_MS, 9)
    assert state.drop_outdated(job).tolist() == []


def test_a_user_that_was_forgotten_on_request_keeps_the_bar() -> None:
    """Its head stays after it has expired, because older events must not bring it back."""
    state, store = state_of(TriggerPolicy(), [b"a"], WITH_TTL), MemoryStore()
    state.apply(batch([b"a", b"a"], [NOW_MS, NOW_MS + 10], tombstones=[True, False]), NOW_MS)
    assert state.expire([b"a"], NOW_MS + 10 * TTL_MS, 9).expired == [b"a"]
    checkpointed(state, store)
    again = reloaded(store, b"a")
    assert again.apply(batch([b"a"], [NOW_MS - 1], offset=10), NOW_MS).count(Outcome.FORGOTTEN) == 1


def test_an_action_after_the_gap_begins_a_new_sequence() -> None:
    """The older actions are forgotten by the log alone, and the tombstone is older than the action's embedding."""
    state = state_of(TriggerPolicy(), [b"a", b"b"], WITH_TTL)
    state.apply(batch([b"a", b"b"], [NOW_MS, NOW_MS]), NOW_MS)
    effects = state.apply(batch([b"b", b"a"], [NOW_MS + TTL_MS - 1, NOW_MS + TTL_MS], offset=5), NOW_MS)
    assert (effects.expired, effects.forgotten, effects.forgotten_offsets.tolist()) == ([b"a"], [b"a"], [5])
    assert (items_of(state, b"a"), items_of(state, b"b")) == ([7], [2, 6])
    assert b"a" in state.begin_job([b"a"]).sequences.users


@given(st.lists(st.integers(0, 4 * TTL_MS), max_size=12), st.integers(1, 12))
def test_gaps_do_not_depend_on_how_events_are_batched(times_ms: Sequence[int], size: int) -> None:
    """Whatever the order of events, the kept actions are those of one event at a time, without and with a restart."""
    one, many = (state_of(TriggerPolicy(), [b"a"], WITH_TTL) for _ in range(2))
    for offset, at_ms in enumerate(times_ms):
        one.apply(batch([b"a"], [NOW_MS + at_ms], offset=offset), NOW_MS)
    for begin in range(0, len(times_ms), size):
        part = [NOW_MS + at_ms for at_ms in times_ms[begin : begin + size]]
        many.apply(batch([b"a"] * len(part), part, offset=begin), NOW_MS)
        store = MemoryStore()
        checkpointed(many, store)
    assert items_of(one, b"a") == items_of(many, b"a")


def test_without_a_ttl_nothing_expires() -> None:
    """A gap of any length keeps the older actions."""
    state = state_of(TriggerPolicy(), [b"a"])
    state.apply(batch([b"a", b"a"], [0, NOW_MS * 1_000_000]), NOW_MS)
    assert items_of(state, b"a") == [1, 2]


def test_a_head_tells_whether_its_user_may_be_too_old() -> None:
    """By the last action in its tail; one that ends with a whole chunk or is damaged does not tell, and is loaded."""
    state, store = state_of(TriggerPolicy(), [b"a", b"b", b"c"], WITH_TTL), MemoryStore()
    state.load([b"d"], nothing_stored(1, WITH_TTL))
    state.seed_published([b"d"], np.array([3]))
    state.apply(batch([b"a", b"a", b"b"], [10, 20, 20]), NOW_MS)
    checkpointed(state, store)

    def may(user: bytes, than_ms: int) -> bool:
        return may_be_older(user, store.records[head_key(user)], than_ms)

    assert (may(b"b", 19), may(b"b", 20)) == (False, True)
    assert (may(b"a", 0), may(b"d", NOW_MS)) == (True, False)
    assert may_be_older(b"x", store.records[head_key(b"b")], 0)
