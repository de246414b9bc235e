"""What is published beyond the state: noted in pages, on disk for users without state, until it means nothing."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faust.types import TP

from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.engine.own_records import Published
from streams.engine.ownership import OwnedPartition
from streams.engine.published import Noted, note_published
from streams.storage.codec import CheckpointMark, encode, encode_mark
from streams.storage.memory_store import MemoryStore
from streams.storage.store import NO_NOTE, PartitionStore, Store
from tests.unit.core.build import LIMITS, batch, state_of

NOW_MS = 1_000_000
Page = list[tuple[bytes, int]]


async def pages_of(pages: Sequence[Page]) -> AsyncGenerator[Published]:
    """Yield pages of (user, source offset); each record takes one offset of the output topic."""
    end = 0
    for page in pages:
        end += len(page)
        offsets = np.array([offset for _, offset in page], np.int64)
        yield Published([user for user, _ in page], offsets, end, newest=int(offsets.max(initial=-1)))


def noted_in(store: Store, state: PartitionState, *pages: Page) -> Noted:
    """Note what these pages hold."""
    return asyncio.run(note_published(pages_of(pages), None, state, store, CheckpointMark(0, 0), lambda notes: None))


def stored(*users: bytes, published: int = -1) -> MemoryStore:
    """Return a store with one action of each user, at offsets from 0, of which those up to `published` are covered."""
    state, store = state_of(TriggerPolicy(), users), MemoryStore()
    state.apply(batch(users, range(len(users))), NOW_MS)
    state.seed_published(users, np.full(len(users), published))
    store.write([*encode(state.begin_checkpoint(), LIMITS), encode_mark(CheckpointMark(len(users), 0))], 9)
    return store


def test_users_without_state_are_noted_on_disk_only() -> None:
    """Nothing of them is in memory, no timer fires for them, and the newest offset of a user counts."""
    state, store = PartitionState(TriggerPolicy(), LIMITS), MemoryStore()
    assert noted_in(store, state, [(b"a", 3), (b"b", 9)], [(b"a", 5)], [(b"b", 2)]) == Noted(4, 0, 10, 10)
    assert store.noted([b"a", b"b", b"c"]) == [5, 9, NO_NOTE]
    assert (state.has_unseen_outputs, state.next_deadline_ms, state.hot_users) == (False, None, 0)


def test_a_stored_user_whose_state_is_behind_is_loaded_soon() -> None:
    """It may be due for what is published already, which it can only find out in memory."""
    state, store = PartitionState(TriggerPolicy(), LIMITS), stored(b"a", b"b")
    assert noted_in(store, state, [(b"a", 0), (b"b", 1)]) == Noted(2, 0, 0, 2)
    assert state.has_unseen_outputs
    assert state.fire_timers(NOW_MS).to_load == [b"a", b"b"]


def test_a_stored_user_whose_state_knows_costs_nothing() -> None:
    """A start in the middle of a replay finds the users that were replayed already, and leaves them on disk."""
    state, store = PartitionState(TriggerPolicy(), LIMITS), stored(b"a", b"b", published=7)
    assert noted_in(store, state, [(b"a", 7), (b"b", 6)]) == Noted(2, 0, 0, 8)
    assert (state.has_unseen_outputs, state.next_deadline_ms) == (False, None)


def test_notes_of_an_earlier_start_are_deleted() -> None:
    """They may be of another encoder version, whose embeddings do not keep those of this one back."""
    state, store = PartitionState(TriggerPolicy(), LIMITS), MemoryStore()
    noted_in(store, state, [(b"a", 3)])
    assert noted_in(store, state, []) == Noted(0, 0, 0, 0)
    assert store.noted([b"a"]) == [NO_NOTE]


def test_a_large_topic_takes_bounded_memory_and_leaves_the_loop_free(tmp_path: Path) -> None:
    """200,000 users take less than 5 MB of Python's memory (a dictionary of them 30), and other work gets a turn."""
    users, page = 200_000, 1_000
    state, store = PartitionState(TriggerPolicy(), LIMITS), PartitionStore.open(tmp_path / "store")
    turns = 0

    async def other_work() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def pages() -> AsyncGenerator[Published]:
        for begin in range(0, users, page):
            offsets = np.arange(begin, begin + page, dtype=np.int64)
            yield Published(
                [b"user-%030d" % offset for offset in offsets], offsets, begin + page, newest=int(offsets[-1])
            )

    async def scenario() -> Noted:
        task = asyncio.create_task(other_work())
        try:
            return await note_published(pages(), None, state, store, CheckpointMark(0, 0), lambda notes: None)
        finally:
            task.cancel()

    tracemalloc.start()
    noted, (_, peak) = asyncio.run(scenario()), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"peak {peak / 1e6:.1f} MB, {turns} turns")
    assert noted == Noted(users, 0, users, users)
    assert store.noted([b"user-%030d" % 123_456]) == [123_456]
    assert peak < 5e6
    assert turns >= users // page - 1
    store.close()


def test_notes_mean_nothing_once_their_events_are_applied() -> None:
    """Until then the mark stays before the noted outputs, so that the next owner reads them again."""
    anything: Any = None
    owned = OwnedPartition(TP("actions", 0), anything, anything, anything, 0, 0, 0, CheckpointMark(0, 40))
    owned.output_offset, owned.notes_until = 90, 10
    for position, has_notes, output_offset in ((0, True, 40), (9, True, 40), (10, False, 90), (11, False, 90)):
        owned.next_offset = position
        assert (owned.has_notes, owned.next_mark().output_offset) == (has_notes, output_offset)
        assert owned.next_mark().source_offset == position
