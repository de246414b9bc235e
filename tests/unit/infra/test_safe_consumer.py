"""Damage that a reader passes is counted, and damage that it cannot pass ends it instead of holding it for ever."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiokafka.structs import TopicPartition

from infra.harness.safe_consumer import SafeConsumer
from streams.engine.records import CorruptBatch

TP = TopicPartition("actions", 3)


async def nothing(**_: object) -> dict[Any, Any]:
    """Return no records."""
    return {}


def test_skipped_offsets_are_counted_once() -> None:
    """Each range counts when it is found, and not again at the next call."""

    async def scenario() -> int:
        reader = SafeConsumer({"bootstrap_servers": "127.0.0.1:1"})
        reader.consumer = cast(Any, SimpleNamespace(getmany=nothing))
        reader._parsing.skipped[TP] = [CorruptBatch(TP, 5, 9, "its checksum is wrong"), CorruptBatch(TP, 12, 12, "")]
        for _ in range(2):
            await reader.take(timeout_ms=1, records_max=1)
        return reader.skipped

    assert asyncio.run(scenario()) == 6


def test_a_codec_that_is_not_installed_ends_the_reader() -> None:
    """The parser does not skip such a batch, so the position would never move."""

    async def scenario() -> None:
        reader = SafeConsumer({"bootstrap_servers": "127.0.0.1:1"})
        reader.consumer = cast(Any, SimpleNamespace(getmany=nothing))
        reader._parsing.faults[TP] = CorruptBatch(TP, 5, 9, "UnsupportedCodecError")
        await reader.take(timeout_ms=1, records_max=1)

    with pytest.raises(CorruptBatch, match="offsets 5 to 9"):
        asyncio.run(scenario())
