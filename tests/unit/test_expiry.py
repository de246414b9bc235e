"""The sweep: who is looked at, by which time, and what happens while the worker lags or loses the partition."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from streams import expiry
from streams.core.policy import TriggerPolicy
from streams.expiry import Expiry
from tests.unit.test_ingest import Site, batch_of
from tests.unit.wire.test_actions import NOW_MS

TTL_MS = 2 * 10**6
"""Above the age of the actions, which are 1,000 s old."""


class Swept(Site):
    """A partition with stored users, and a sweep under a clock moved by hand."""

    def __init__(self, hot_users_max: int = 16) -> None:
        super().__init__(hot_users_max, TriggerPolicy(every_n=0), TTL_MS)
        self.now_ms = NOW_MS
        partitions: Any = self.partitions
        self.expiry = Expiry(self.ingest, partitions, TTL_MS, lambda: self.now_ms)

    async def sweep(self) -> None:
        """Checkpoint, and sweep once."""
        await self.partitions.checkpoint(self.owned)
        await self.expiry.sweep(self.owned)
        await asyncio.sleep(0)


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> Swept:
    """Return a partition with 100 users, of whom 16 fit into memory; the pages of a sweep follow at once."""
    monkeypatch.setattr(expiry, "PAGE_EVERY_S", 0)
    monkeypatch.setattr(expiry, "CATCH_UP_EVERY_S", 0)
    return Swept()


USERS = [f"user-{number:02d}" for number in range(100)]


def test_users_on_disk_and_in_memory_expire(swept: Swept) -> None:
    """All but the user of the last record go: tombstones, cache, records, and a count; those that act again stay."""

    async def scenario() -> None:
        await swept.feed(batch_of(USERS))
        await swept.sweep()
        assert swept.metrics.users_expired.value() == 0
        swept.now_ms = NOW_MS - 10**6 + 99 + TTL_MS
        await swept.sweep()

    asyncio.run(scenario())
    gone = [user.encode() for user in USERS[:99]]
    assert swept.metrics.users_expired.value() == 99
    assert (sorted(swept.outputs.tombstones), sorted(swept.queue.forgotten)) == (gone, gone)
    assert swept.owned.state.hot_users <= 16
    asyncio.run(swept.partitions.checkpoint(swept.owned))
    assert [user for user, _ in swept.owned.store.heads()] == [b"user-99"]


def test_a_worker_that_lags_forgets_nobody_whose_action_it_has_not_read(swept: Swept) -> None:
    """The sweep waits for the end of the log as of its begin, and an action on the way keeps its user."""

    async def scenario() -> None:
        await swept.feed(batch_of(["ann", "bob", "cat"]))
        await swept.partitions.checkpoint(swept.owned)
        swept.partitions.end, swept.now_ms = 5, NOW_MS + TTL_MS
        sweeping = asyncio.create_task(swept.expiry.sweep(swept.owned))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not sweeping.done()
        await swept.ingest.on_batch(batch_of(["ann", "dan"], begin=3, at_ms=NOW_MS))
        await sweeping

    asyncio.run(scenario())
    assert sorted(swept.queue.forgotten) == [b"bob", b"cat"]


@pytest.mark.parametrize("event", ["lost", "halted", "held"])
def test_a_sweep_ends_with_its_partition(swept: Swept, event: str) -> None:
    """Nothing is forgotten in a partition that was lost or is paused, and the sweep does not wait for it."""

    async def scenario() -> None:
        await swept.feed(batch_of(["ann", "bob"]))
        await swept.partitions.checkpoint(swept.owned)
        swept.partitions.end, swept.now_ms = 5, NOW_MS + TTL_MS
        sweeping = asyncio.create_task(swept.expiry.sweep(swept.owned))
        await asyncio.sleep(0)
        if event == "lost":
            swept.partitions.ready.clear()
        getattr(swept.partitions, event, {})[0] = "a reason"
        await asyncio.wait_for(sweeping, 1)

    asyncio.run(scenario())
    assert swept.queue.forgotten == []


def test_without_a_ttl_there_is_no_sweep(swept: Swept) -> None:
    """The task ends at once."""
    partitions: Any = swept.partitions
    asyncio.run(Expiry(swept.ingest, partitions, 0, lambda: NOW_MS).run())
