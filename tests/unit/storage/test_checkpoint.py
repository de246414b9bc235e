"""A checkpoint's side effects have a fixed order, and a failure between any two leaves the state dirty."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.storage.checkpoint import CheckpointMark, checkpoint
from streams.storage.codec import MARK_KEY
from streams.storage.memory_store import MemoryStore
from streams.storage.store import Record
from tests.unit.core.build import batch, state_of

MARK = CheckpointMark(source_offset=3, output_offset=11)


class Broken(Exception):
    """The failure of a port."""


class Recorder:
    """Both ports; logs each call and fails at one step."""

    def __init__(self, fails_at: str = "") -> None:
        self.log: list[str] = []
        self.fails_at = fails_at
        self.records: list[Record] = []

    def _note(self, step: str) -> None:
        if step == self.fails_at:
            raise Broken(step)
        self.log.append(step)

    async def acknowledged(self) -> None:
        """Log the call."""
        self._note("acknowledged")

    async def begin(self) -> None:
        """Log the call."""
        self._note("begin")

    async def append(self, records: Sequence[Record]) -> int:
        """Log the call; return offset 41."""
        self._note("append")
        self.records = list(records)
        return 41

    async def send_source_offset(self, source_offset: int) -> None:
        """Log the offset."""
        self._note(f"source offset {source_offset}")

    async def commit(self) -> None:
        """Log the call."""
        self._note("commit")


class Store(MemoryStore):
    """A store that logs writes."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def write_steps(self, records: Sequence[Record], changelog_offset: int) -> Iterator[None]:
        """Log the write, then write."""
        self.recorder._note("store")
        return super().write_steps(records, changelog_offset)


def _state() -> PartitionState:
    state = state_of(TriggerPolicy(), [b"a", b"b"])
    state.apply(batch([b"a", b"b", b"a"], [1, 2, 3]), 1_000)
    return state


def test_order_of_side_effects() -> None:
    """Outputs, then records and source offset in one transaction, then the store with the changelog offset."""
    recorder = Recorder()
    store, state = Store(recorder), _state()
    written = asyncio.run(checkpoint(state, MARK, recorder, recorder, store))
    assert recorder.log == ["acknowledged", "begin", "append", "source offset 3", "commit", "store"]
    assert (store.changelog_offset, store.mark()) == (41, MARK)
    assert recorder.records[-1][0] == MARK_KEY
    assert written == len(recorder.records) == 4
    assert len(state.begin_checkpoint()) == 0


@pytest.mark.parametrize("step", ["acknowledged", "begin", "append", "source offset 3", "commit"])
def test_failure_before_the_commit_leaves_the_state_dirty(step: str) -> None:
    """The error passes through, the store is unchanged, and the next checkpoint writes everything."""
    recorder, state = Recorder(fails_at=step), _state()
    store = Store(recorder)
    with pytest.raises(Broken):
        asyncio.run(checkpoint(state, MARK, recorder, recorder, store))
    assert store.records == {}
    again = Recorder()
    asyncio.run(checkpoint(state, MARK, again, again, Store(again)))
    assert len(again.records) == 4
