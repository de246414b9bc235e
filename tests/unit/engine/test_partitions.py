"""Halting, restarting and rebuilding partitions, over a broker and a consumer replaced by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from faust.types import TP

from streams.core.policy import TriggerPolicy
from streams.engine import checkpoints
from streams.engine.delivery import RecordBatch
from streams.engine.ownership import OwnedPartition
from streams.engine.partition_host import PartitionsConfig
from streams.engine.partitions import Partitions
from streams.storage.memory_store import MemoryStore
from streams.storage.store import NO_NOTE
from streams.telemetry.metrics import Metrics
from tests.unit.core.build import state_of

SOURCE = TP("actions", 0)
GENERATION = 7


class Producer:
    """A transactional producer that records what is done with it."""

    is_worn = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.events: list[str] = STARTED

    async def start(self) -> None:
        """Record that predecessors were fenced, and fail: these tests end there."""
        self.events.append("fenced")
        raise ConnectionError("no broker")

    async def stop(self) -> None:
        """Do nothing."""


STARTED: list[str] = []


class Store:
    """A local database of which only the end is seen."""

    def close(self) -> None:
        """Do nothing."""


class App:
    """Faust's app, consumer, thread and group coordinator in one."""

    consumer_generation_id = GENERATION
    is_member = True

    def __init__(self) -> None:
        self.consumer = self._thread = self._coordinator = self
        self.paused: set[TP] = set()
        self.sought: list[int] = []

    def _ensure_consumer(self) -> App:
        return self

    async def _do_heartbeat(self) -> bool:
        return self.is_member

    async def call_thread(self, method: Callable[..., Any], *args: Any) -> Any:
        """Call the method directly."""
        return await method(*args)

    def pause_partitions(self, tps: Collection[TP]) -> None:
        """Note that these are paused."""
        self.paused |= set(tps)

    def resume_partitions(self, tps: Collection[TP]) -> None:
        """Note that these are fetched again."""
        self.paused -= set(tps)

    def epoch(self, tp: TP) -> int:
        """Return the number of seeks."""
        return len(self.sought)

    async def seek_wait(self, offsets: dict[TP, int]) -> None:
        """Note where a partition goes on."""
        self.sought += offsets.values()


class Host:
    """The worker as its partitions see it."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.lost: list[int] = []
        self.while_revoking: Callable[[], Any] | None = None

    def destroy_store(self, path: Path) -> None:
        """Do nothing: there is no database."""

    async def on_revoking(self, owned: Collection[OwnedPartition]) -> None:
        """Let the test do something in the meantime, once."""
        if self.while_revoking is not None:
            do, self.while_revoking = self.while_revoking, None
            await do()

    def on_lost(self, owned: OwnedPartition) -> None:
        """Note which partition was given up."""
        self.lost.append(owned.tp.partition)

    def abort(self, reason: str) -> None:
        """Note why the worker would have ended."""
        self.aborted.append(reason)


@pytest.fixture
def fenced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace transactional producers; return the list of their starts."""
    monkeypatch.setattr(checkpoints, "ChangelogProducer", Producer)
    STARTED.clear()
    return STARTED


def partitions_in(folder: Path, assigned: Collection[int] = (0,)) -> tuple[Partitions, App, Host]:
    """Return partitions of which none is ready."""
    config = PartitionsConfig("app", SOURCE.topic, "changelog", {}, folder, 1_000, 1_000, 6_000)
    host, app = Host(), App()
    partitions = Partitions(config, host, Metrics())  # type: ignore[arg-type]
    partitions.app, partitions.assigned = app, frozenset(assigned)
    return partitions, app, host


def owned_by(partitions: Partitions, next_offset: int = 40) -> OwnedPartition:
    """Make partition 0 ready at an offset, with nothing to checkpoint."""
    state: Any = state_of(TriggerPolicy(), [])
    store: Any = Store()
    producer: Any = Producer()
    owned = OwnedPartition(SOURCE, state, store, producer, next_offset, next_offset, 0)
    partitions.ready[0] = owned
    return owned


def test_a_rebuild_that_loses_its_partition_fences_nobody(tmp_path: Path, fenced: list[str]) -> None:
    """When the partition is revoked while the rebuild waits for work in flight, no producer is started for it."""

    async def scenario() -> None:
        partitions, _, host = partitions_in(tmp_path)
        owned = owned_by(partitions)
        host.while_revoking = partitions.revoke_all
        await partitions.rebuild(owned)
        await asyncio.sleep(0.05)

    asyncio.run(scenario())
    assert fenced == []


def test_the_database_of_a_partition_is_in_use_until_it_is_closed(tmp_path: Path) -> None:
    """It may be used while the partition is assigned, being acquired, or not closed yet after a revocation."""

    async def scenario() -> None:
        partitions, _, host = partitions_in(tmp_path)
        owned_by(partitions)
        seen: list[bool] = []

        async def look() -> None:
            seen.append(partitions.may_use(0))

        host.while_revoking = look
        seen.append(partitions.may_use(0))
        await partitions.revoke_all()
        assert [*seen, partitions.may_use(0)] == [True, True, False]

    asyncio.run(scenario())


def test_a_rebuild_in_an_outdated_generation_fences_nobody(tmp_path: Path, fenced: list[str]) -> None:
    """When the next assignment arrives while the rebuild waits, only that assignment acquires the partition."""

    async def scenario() -> None:
        partitions, app, host = partitions_in(tmp_path)
        owned = owned_by(partitions)

        async def next_generation() -> None:
            app.consumer_generation_id += 1

        host.while_revoking = next_generation
        await partitions.rebuild(owned)
        await asyncio.sleep(0.05)

    asyncio.run(scenario())
    assert fenced == []


def test_a_worker_that_left_its_group_fences_nobody(tmp_path: Path, fenced: list[str]) -> None:
    """A worker whose group does not know it any more (it was frozen past its session) does not acquire again."""

    async def scenario() -> None:
        partitions, app, _ = partitions_in(tmp_path)
        owned = owned_by(partitions)
        app.is_member = False
        await partitions.rebuild(owned)
        await asyncio.sleep(0.05)
        await partitions.revoke_all()

    asyncio.run(scenario())
    assert fenced == []


def test_a_halted_partition_takes_nothing_and_continues_where_it_stopped(tmp_path: Path, fenced: list[str]) -> None:
    """A halted partition is paused and ignores batches; resumed, it is sought to its first unprocessed record."""

    async def scenario() -> None:
        partitions, app, host = partitions_in(tmp_path)
        owned = owned_by(partitions, next_offset=40)
        batch = RecordBatch(SOURCE, 40, 41, [], 0)
        assert await partitions.accept(batch) is owned
        partitions.halt(0, "a test")
        assert app.paused == {SOURCE}
        assert await partitions.accept(batch) is None
        assert (partitions.halted.copy(), partitions.progress(), host.aborted) == ({0: "a test"}, {}, [])
        await partitions.resume(0)
        assert (app.paused, app.sought, partitions.halted.copy()) == (set(), [40], {})
        await partitions.revoke_all()

    asyncio.run(scenario())


def test_a_partition_that_cannot_be_acquired_is_tried_again(
    tmp_path: Path, fenced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed acquisition halts the partition and is repeated; the worker goes on."""
    monkeypatch.setattr("streams.engine.halts.RETRY_FIRST_S", 0.01)

    async def scenario() -> None:
        partitions, _, host = partitions_in(tmp_path, {0, 1})
        await partitions.on_assigned(frozenset({TP("changelog", 0)}), GENERATION)
        await asyncio.sleep(0.1)
        assert "no broker" in partitions.halted[0]
        assert host.aborted == []
        await partitions.revoke_all()

    asyncio.run(scenario())
    assert len(fenced) > 1


def test_a_restart_drops_the_state_without_a_write(tmp_path: Path, fenced: list[str]) -> None:
    """A partition whose state cannot be used any more is halted, given up and acquired again after a delay."""

    async def scenario() -> None:
        partitions, app, host = partitions_in(tmp_path)
        owned_by(partitions)
        await partitions.restart(0, "a bug")
        assert (host.lost, partitions.ready, partitions.halted.copy()) == ([0], {}, {0: "a bug"})
        assert app.paused == {SOURCE}
        assert len(partitions._acquiring) == 1
        await partitions.revoke_all()
        assert not partitions._acquiring

    asyncio.run(scenario())


def test_a_failed_checkpoint_fences_nobody_once_the_worker_has_left_its_group(
    tmp_path: Path, fenced: list[str]
) -> None:
    """A frozen worker whose checkpoint failed starts no new producer before the group has confirmed its membership."""

    async def scenario() -> None:
        partitions, app, _ = partitions_in(tmp_path)
        owned = owned_by(partitions)
        owned.producer_failed, app.is_member = True, False
        await partitions.checkpoint(owned)
        assert fenced == []
        app.is_member = True
        await partitions.checkpoint(owned)
        assert fenced == ["fenced"]

    asyncio.run(scenario())


def test_notes_are_deleted_by_the_checkpoint_that_has_passed_them(
    tmp_path: Path, fenced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before that they stay: events that they are for are still to come."""

    async def scenario() -> None:
        async def written(*args: Any) -> int:
            return 1

        monkeypatch.setattr(checkpoints, "checkpoint", written)
        partitions, _, _ = partitions_in(tmp_path)
        owned: Any = owned_by(partitions)
        owned.store, owned.producer.bytes_written, owned.notes_until = MemoryStore(), 0, 42
        owned.store.note([b"ann"], [41])
        for position, noted in ((41, [41]), (42, [NO_NOTE])):
            owned.next_offset = position
            await partitions.checkpoint(owned)
            assert owned.committed_offset == position
            assert owned.store.noted([b"ann"]) == noted
        assert owned.notes_until == 0

    asyncio.run(scenario())


def test_a_fenced_partition_that_is_still_ours_is_acquired_again(
    tmp_path: Path, fenced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker fences the producer of a transaction that took too long; the group knows whose the partition is."""
    monkeypatch.setattr(checkpoints, "REACQUIRE_AFTER_S", 0.0)
    monkeypatch.setattr("streams.engine.halts.RETRY_FIRST_S", 0.01)

    async def scenario() -> None:
        partitions, _, host = partitions_in(tmp_path)
        await partitions._drop_fenced(owned_by(partitions))
        assert (fenced, partitions.ready) == ([], {})
        await partitions._check_fenced()
        await asyncio.sleep(0.05)
        assert (host.aborted, "fenced" in fenced) == ([], True)
        await partitions.revoke_all()

    asyncio.run(scenario())


def test_a_fenced_worker_that_has_lost_its_group_ends(
    tmp_path: Path, fenced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fences nobody, and ends after a session timeout without a rebalance."""
    monkeypatch.setattr(checkpoints, "REACQUIRE_AFTER_S", 0.0)

    async def scenario() -> None:
        partitions, app, host = partitions_in(tmp_path)
        app.is_member = False
        await partitions._drop_fenced(owned_by(partitions))
        await partitions._check_fenced()
        assert (fenced, host.aborted) == ([], [])
        partitions._fenced_at[0] -= 60
        await partitions._check_fenced()
        assert fenced == []
        assert "no rebalance has followed" in host.aborted[0]

    asyncio.run(scenario())
