"""Rebased users: their sequences are untouched, their offsets are of the new log, and who waits keeps waiting."""

from __future__ import annotations

import numpy as np
import pytest

from encoder.actions.columns import ActionBatch
from streams.core.layout import StateLimits, new_headers
from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.storage.codec import Records, decode_head, encode, head_key, seal
from streams.storage.memory_store import MemoryStore
from streams.storage.reader import read_users
from streams.storage.rebase import OTHER_LOG, rebase
from tests.unit.core.build import batch

LIMITS = StateLimits(sequence_length=8, chunk_length=2, hot_users_max=8, wake_users_max=8)
USERS = [b"ann", b"bob"]


def state_after(store: MemoryStore | None, batch: ActionBatch) -> PartitionState:
    """Return a state that has loaded the users of a store and applied a batch."""
    state = PartitionState(TriggerPolicy(), LIMITS)
    state.load(USERS, read_users(store or MemoryStore(), USERS, LIMITS).stored)
    state.apply(batch, 1_000)
    return state


def stored(state: PartitionState) -> MemoryStore:
    """Return a store with a checkpoint of the state."""
    store = MemoryStore()
    store.write(encode(state.begin_checkpoint(), LIMITS), 1)
    return store


def rebased(store: MemoryStore, offset_max: int) -> MemoryStore:
    """Return the store with rebased heads."""
    records: Records
    records, corrupt = rebase(list(store.heads()), offset_max)
    assert not corrupt
    store.write(records, 2)
    return store


def test_events_of_another_log_are_new() -> None:
    """A rebased user takes an event at offset 0, and its sequence continues where it was."""
    before = state_after(None, batch(USERS * 3, range(1, 7), offset=100))
    again = state_after(rebased(stored(before), OTHER_LOG), batch(USERS, [9, 9], offset=0))
    job = again.begin_job(USERS)
    assert np.diff(job.sequences.starts).tolist() == [4, 4]
    assert job.offsets.tolist() == [0, 1]


def test_without_a_rebase_they_are_duplicates() -> None:
    """The same event is dropped if the offsets of the old log remain."""
    before = state_after(None, batch(USERS * 3, range(1, 7), offset=100))
    again = state_after(stored(before), batch(USERS, [9, 9], offset=0))
    assert np.diff(again.begin_job(USERS).sequences.starts).tolist() == [3, 3]


def test_a_user_that_waits_is_published_and_one_that_does_not_is_not() -> None:
    """Ann was published before the rebase and bob was not: only bob is due afterwards, and is done once published."""
    state = state_after(None, batch(USERS, [1, 2], offset=100))
    job = state.begin_job([b"ann"])
    state.finish_job([b"ann"], job.offsets, 1_001)
    state.retry_job(state.begin_job([]), 1_001, 0)
    store = rebased(stored(state), OTHER_LOG)
    again = PartitionState(TriggerPolicy(), LIMITS)
    again.seed_deadlines(store.pending())
    to_load = again.fire_timers(5_000).to_load
    again.load(to_load, read_users(store, to_load, LIMITS).stored)
    effects = again.fire_timers(5_000)
    assert (to_load, list(effects.due)) == ([b"bob"], [b"bob"])
    job = again.begin_job([b"bob"])
    assert again.drop_outdated(job).tolist() == [0]
    again.finish_job([b"bob"], job.offsets, 5_001)
    assert len(again.begin_job([b"bob"])) == 0


@pytest.mark.parametrize(
    ("offset_max", "expected"), [(150, (120, 110, 120)), (115, (115, 110, 115)), (50, (50, 49, 50))]
)
def test_offsets_are_lowered_no_further_than_needed(offset_max: int, expected: tuple[int, ...]) -> None:
    """After a truncation offsets below the new end stay; the published one stays below the applied one of who waits."""
    header = new_headers(1, LIMITS)
    header["applied_offset"], header["encoded_offset"], header["due_offset"] = 120, 110, 120
    header["reason"], header["unencoded"] = 1, 1
    ((_, value),), _ = rebase([(b"ann", seal(head_key(b"ann"), header.tobytes()))], offset_max)
    assert value is not None
    (found,) = decode_head(b"ann", value)[0]
    assert (found["applied_offset"], found["encoded_offset"], found["due_offset"]) == expected


def test_a_corrupt_head_is_left_out_and_named() -> None:
    """A head with a wrong checksum is not written again with a right one."""
    good = seal(head_key(b"ann"), new_headers(1, LIMITS).tobytes())
    records, corrupt = rebase([(b"ann", good), (b"bob", good)], OTHER_LOG)
    assert ([key for key, _ in records], corrupt) == ([head_key(b"ann")], [b"bob"])
