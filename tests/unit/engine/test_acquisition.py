"""A source log that was truncated and has grown again while no worker ran: found at acquisition, with a fake broker."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from streams.engine import acquisition
from streams.engine.acquisition import ProvenPartitions
from streams.engine.partition_host import PartitionsConfig
from streams.engine.proof import COMMITTED_BY, Proven, SourceTruncated
from streams.storage.codec import CheckpointMark
from streams.storage.identity import Identity, LastRecord
from streams.telemetry.metrics import Metrics

SOURCE = TP("actions", 2)
IDENTITY = Identity("cluster", "actions", "id-1", "id-2", "")


class Consumer:
    """The ends of a source log."""

    async def highwaters(self, *tps: TP) -> dict[TP, int]:
        """Return the end."""
        return {SOURCE: 130}

    async def earliest_offsets(self, *tps: TP) -> dict[TP, int]:
        """Return the beginning."""
        return {SOURCE: 10}


def proven(mark: CheckpointMark, folder: Path) -> Proven:
    """Prove a state with this mark."""
    none: Any = None
    partitions = ProvenPartitions(
        PartitionsConfig("app", SOURCE.topic, "changelog", {}, folder, 1_000, 1_000, 6_000), none, Metrics()
    )
    partitions.app = SimpleNamespace(consumer=Consumer())
    store: Any = SimpleNamespace(mark=lambda: mark)
    return asyncio.run(partitions._prove(SOURCE, store, IDENTITY, (mark.source_offset, COMMITTED_BY)))


def test_an_overwritten_log_is_noticed_at_acquisition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record at the offset of the mark's last one is read once, and another one halts the partition."""
    held, asked = LastRecord(98, 5), []

    async def reread(*args: Any) -> LastRecord:
        asked.append(args)
        return found

    monkeypatch.setattr(acquisition, "reread", reread)
    mark = CheckpointMark(100, 7, IDENTITY, last=held)
    found = held
    assert proven(mark, tmp_path).mark == mark
    found = LastRecord(98, 6)
    with pytest.raises(SourceTruncated, match="partition 2 of actions holds another record at offset 98"):
        proven(mark, tmp_path)
    assert [args[1:5] for args in asked] == [({}, mark, 10, 130)] * 2
