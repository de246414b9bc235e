"""Batches of any size through the ingest loop: in parts, within the memory of the state, and without a pause."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from faust.types import TP

from streams.core.layout import StateLimits, share
from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.engine.delivery import RecordBatch
from streams.engine.ownership import OwnedPartition
from streams.ingest import PART_RECORDS_MAX, Ingest
from streams.storage.checkpoint import checkpoint
from streams.storage.codec import CheckpointMark
from streams.storage.memory_store import MemoryStore
from streams.telemetry.metrics import Metrics
from streams.wire.actions import DecodeLimits
from streams.wire.embeddings import Message
from tests.unit.wire.test_actions import NOW_MS, FetchedRecord

SOURCE = TP("actions", 0)
LONGEST_PART_S = 0.25
"""Generous: a part of 8,192 records takes about a tenth of it, and the machine has other work."""


class Changelog:
    """A changelog that keeps nothing; `streams.storage.checkpoint` only needs it to accept."""

    def __init__(self) -> None:
        self.marks: list[int] = []

    async def acknowledged(self) -> None:
        """Return at once: nothing was published."""

    async def begin(self) -> None:
        """Begin nothing."""

    async def append(self, records: Sequence[Any]) -> int:
        """Accept the records."""
        return len(records)

    async def send_source_offset(self, source_offset: int) -> None:
        """Record the position of the checkpoint."""
        self.marks.append(source_offset)

    async def commit(self) -> None:
        """Commit nothing."""


class Partitions:
    """A fake of the partitions: one is ready, and is checkpointed on request."""

    source_partitions = 1
    rebalancing = False

    def __init__(self, owned: OwnedPartition) -> None:
        self.app = self
        self.ready, self.assigned = {0: owned}, frozenset({0})
        self.halted: dict[int, str] = {}
        self.held: dict[int, Any] = {}
        self.changelog = Changelog()
        self.end = 0
        """End of the log."""

    def ends(self, owned: OwnedPartition) -> tuple[int, int]:
        """Return the end of the log."""
        return self.end, self.end

    async def read_end(self, owned: OwnedPartition) -> int:
        """Return the end of the log."""
        return self.end

    async def accept(self, batch: RecordBatch) -> OwnedPartition | None:
        """Accept every batch."""
        return self.ready.get(0)

    def checkpoint_soon(self, owned: OwnedPartition) -> None:
        """Checkpoint in the background, one at a time."""
        if not owned.checkpointing.locked():
            self.running = asyncio.ensure_future(self.checkpoint(owned))

    async def checkpoint(self, owned: OwnedPartition) -> None:
        """Write a checkpoint to the store."""
        async with owned.checkpointing:
            log: Any = self.changelog
            await checkpoint(owned.state, owned.next_mark(), log, log, owned.store)
            owned.committed_offset = self.changelog.marks[-1]


class Queue:
    """A queue that takes everything; users in it are handed back as published by the test."""

    has_room = True

    def __init__(self) -> None:
        self.users: list[bytes] = []
        self.forgotten: list[bytes] = []

    def forget(self, users: Sequence[bytes]) -> None:
        """Record whose cache is dropped."""
        self.forgotten += users

    def put(self, jobs: Any, users: Sequence[bytes], *rest: Any) -> None:
        """Keep the users."""
        self.users += users


class Outputs:
    """Outputs that keep the tombstones."""

    def __init__(self) -> None:
        self.tombstones: list[bytes | None] = []
        self.topics = ["embeddings"]

    async def publish_tombstones(self, partition: int, messages: Sequence[Message], topic: str) -> int:
        """Keep whose tombstones these are."""
        self.tombstones += [key for key, _, _ in messages]
        return len(self.tombstones)


class Site:
    """An ingest loop over one partition, whose store is in memory."""

    def __init__(self, hot_users_max: int, policy: TriggerPolicy, user_ttl_ms: int = 0) -> None:
        limits = StateLimits(
            sequence_length=64, chunk_length=8, hot_users_max=hot_users_max, wake_users_max=1, user_ttl_ms=user_ttl_ms
        )
        state, store, none = PartitionState(policy, limits), MemoryStore(), None
        anything: Any = none
        self.owned = OwnedPartition(SOURCE, state, store, anything, 0, 0, 0)  # type: ignore[arg-type]
        self.owned.mark = CheckpointMark(0, 0)
        self.partitions, self.queue, self.metrics, self.outputs = Partitions(self.owned), Queue(), Metrics(), Outputs()
        parts: Any = (self.partitions, self.queue, self.outputs, self.metrics)
        self.ingest = Ingest(*parts, limits=DecodeLimits(), checkpoint_events_max=10**9, now_ms=lambda: NOW_MS)
        self.jobs: Any = object()
        self.ingest.add(self.owned, self.jobs)
        self.most_hot = 0
        self.positions: list[int] = []
        self.longest_s = 0.0

    async def feed(self, *batches: RecordBatch, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Apply batches while another task observes positions, memory and how long the loop was held."""
        watching = asyncio.create_task(self._watch(meanwhile))
        await asyncio.sleep(0)
        for batch in batches:
            await self.ingest.on_batch(batch)
        watching.cancel()

    async def _watch(self, meanwhile: Callable[[], None]) -> None:
        last_s = time.monotonic()
        while True:
            await asyncio.sleep(0)
            now_s = time.monotonic()
            self.longest_s, last_s = max(self.longest_s, now_s - last_s), now_s
            self.most_hot = max(self.most_hot, self.owned.state.hot_users)
            if self.owned.next_offset not in self.positions[-1:]:
                self.positions.append(self.owned.next_offset)
            meanwhile()


def batch_of(users: Sequence[str], begin: int = 0, *, late_every: int = 0, at_ms: int = NOW_MS - 10**6) -> RecordBatch:
    """Return one action of each of `users`, at consecutive offsets; one in `late_every` of them is 10 ms late."""

    def action(number: int, user: str) -> bytes:
        late_ms = 10 if late_every and number % late_every == 0 else 0
        time_ms, event_id = at_ms + begin + number - late_ms, str(begin + number)
        event = {"user_id": user, "item_id": "i", "action": "view", "timestamp_ms": time_ms, "event_id": event_id}
        return json.dumps(event).encode()

    records = [FetchedRecord(user.encode(), action(n, user), offset=begin + n) for n, user in enumerate(users)]
    return RecordBatch(SOURCE, begin, begin + len(users), list(records), 0)


@pytest.mark.parametrize("in_order", [True, False])
def test_one_user_with_100_000_actions_in_one_batch_does_not_hold_the_event_loop(in_order: bool) -> None:
    """The batch is applied in parts of 8,192 records, between which the loop does other work; late events included."""
    site, count = Site(65_536, TriggerPolicy(every_n=0)), 100_000
    asyncio.run(site.feed(batch_of(["ann"] * count, late_every=0 if in_order else 3)))
    assert site.owned.next_offset == count
    assert site.positions == list(range(PART_RECORDS_MAX, count, PART_RECORDS_MAX))
    assert site.metrics.events.value() == count
    assert (site.metrics.late_inserted.value() > 0) is not in_order
    print(f"longest hold of the event loop: {1000 * site.longest_s:.0f} ms")
    assert site.longest_s < LONGEST_PART_S


def test_one_user_with_5_000_events_per_second_leaves_the_loop_nearly_idle() -> None:
    """Five seconds of one user's events, in fetches of 20 ms, take less than half of that time."""
    site = Site(65_536, TriggerPolicy(every_n=0))
    batches = [batch_of(["ann"] * 100, begin) for begin in range(0, 25_000, 100)]
    began_s = time.monotonic()
    asyncio.run(site.feed(*batches))
    seconds = time.monotonic() - began_s
    print(f"{seconds:.2f} s for 5 s of events")
    assert site.owned.next_offset == 25_000
    assert seconds < 2.5


def test_a_batch_with_more_users_than_fit_into_memory_is_applied() -> None:
    """Parts are as small as the state, checkpoints make room between them, and each stands at the end of a part."""
    site, users = Site(16, TriggerPolicy(every_n=0)), [f"user-{n}" for n in range(500)]
    asyncio.run(site.feed(batch_of(users)))
    assert site.owned.next_offset == 500
    assert site.most_hot <= 16
    assert {mark % 16 for mark in site.partitions.changelog.marks} == {0}


def test_the_rest_of_a_batch_is_left_when_the_partition_is_lost_or_paused() -> None:
    """Between two parts others may act: what was not applied is fetched again, and nothing is applied twice."""

    def lose(site: Site) -> None:
        site.partitions.ready.clear()

    def halt(site: Site) -> None:
        site.partitions.halted[0] = "a reason"

    def seek(site: Site) -> None:
        site.owned.epoch += 1

    for act in (lose, halt, seek):
        site = Site(16, TriggerPolicy(every_n=0))

        def meanwhile(site: Site = site, act: Callable[[Site], None] = act) -> None:
            if site.owned.next_offset == 32:
                act(site)

        asyncio.run(site.feed(batch_of(["ann"] * 100), meanwhile=meanwhile))
        assert site.owned.next_offset == 32
        assert site.metrics.events.value() == 32


def test_a_replay_publishes_nothing_that_a_note_covers() -> None:
    """A noted user is due for actions after the note only; others, and those after the end of the notes, as always."""
    site = Site(16, TriggerPolicy())
    site.owned.store.note([b"ann", b"bob"], [1, 5])
    site.owned.notes_until = 6
    asyncio.run(site.feed(batch_of(["ann", "ann", "cat", "bob"])))
    assert site.queue.users == [b"cat"]
    asyncio.run(site.feed(batch_of(["ann", "bob", "bob"], begin=4)))
    assert site.queue.users == [b"cat", b"ann", b"bob"]


def test_shares_of_the_users_in_memory_never_exceed_the_limit_of_the_worker() -> None:
    """Each partition gets an equal share, at most its own limit, at least one user; timers fire within the share."""
    limits = StateLimits(hot_users_max=300, wake_users_max=200)
    for partitions in range(1, 40):
        each = share(limits, 600, partitions)
        assert partitions * each.hot_users_max <= 600
        assert each.wake_users_max <= each.hot_users_max
    assert [share(limits, 600, n).hot_users_max for n in (0, 1, 2, 4, 600, 601)] == [300, 300, 300, 150, 1, 1]
    assert share(limits, 10**6, 4) == limits
