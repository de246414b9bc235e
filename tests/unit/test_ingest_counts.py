"""The ingest loop counts each batch once. The partition is in memory, with fakes around it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
from faust.types import TP

from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.engine.delivery import RecordBatch
from streams.engine.ownership import OwnedPartition
from streams.ingest import TIMERS_EVERY_S, Ingest
from streams.storage.codec import CheckpointMark
from streams.storage.identity import LastRecord
from streams.storage.memory_store import MemoryStore
from streams.telemetry.metrics import Histogram, Metrics
from streams.wire.actions import LOG_APPEND_TIME, DecodeLimits
from streams.wire.partitioner import partitions_of
from tests.unit.core.build import LIMITS

NOW_MS = 1_700_000_000_000
TOPIC = TP("actions", 0)
CREATE_TIME = 0


@dataclass
class Fetched:
    """A record as the worker's parser returns it."""

    key: bytes
    value: bytes | None
    offset: int
    timestamp: int
    timestamp_type: int
    headers: tuple[tuple[str, bytes], ...] = ()


def action(
    offset: int, event_ms: int, arrival_ms: int, timestamp_type: int = LOG_APPEND_TIME, user: bytes = b"ann"
) -> Fetched:
    """Return an action."""
    name = user.decode()
    event = {"user_id": name, "item_id": "i", "action": "see", "timestamp_ms": event_ms, "event_id": f"{event_ms}"}
    return Fetched(user, json.dumps(event).encode(), offset, arrival_ms, timestamp_type)


class Around:
    """The partitions, the encode queue and the outputs of a worker in one, around one owned partition."""

    has_room, rebalancing, source_partitions = True, False, 1

    def __init__(self) -> None:
        none: Any = None
        store: Any = MemoryStore()
        state = PartitionState(TriggerPolicy(), LIMITS)
        self.owned = OwnedPartition(TOPIC, state, store, none, 0, 0, 0)
        self.app, self.ready, self.assigned = self, {0: self.owned}, {0}
        self.halted: dict[int, str] = {}
        self.held: dict[int, str] = {}
        self.topics = ["embeddings"]

    async def accept(self, batch: RecordBatch) -> OwnedPartition:
        """Return the partition."""
        return self.owned

    async def dead_letters(self, partition: int, letters: object) -> None:
        """Do nothing."""

    async def publish_tombstones(self, partition: int, messages: object, topic: str) -> None:
        """Do nothing."""

    def checkpoint_soon(self, owned: OwnedPartition) -> None:
        """Do nothing."""


def ingested(*batches: list[Fetched]) -> tuple[Metrics, OwnedPartition]:
    """Return metrics and partition after these batches."""
    metrics, around = Metrics(), Around()
    fakes: Any = around
    ingest = Ingest(
        fakes, fakes, fakes, metrics, limits=DecodeLimits(), checkpoint_events_max=100, now_ms=lambda: NOW_MS
    )
    for records in batches:
        asyncio.run(ingest.on_batch(RecordBatch(TOPIC, records[0].offset, records[-1].offset + 1, records, 0)))
    asyncio.run(one_round(ingest))
    return metrics, around.owned


async def one_round(ingest: Ingest) -> None:
    """Let the loop of the timers run once."""
    running = asyncio.create_task(ingest.run_timers())
    await asyncio.sleep(1.5 * TIMERS_EVERY_S)
    running.cancel()


def seconds(histogram: Histogram) -> tuple[int, float]:
    """Return number and sum of the observations."""
    [held] = histogram.samples().values()
    return int(held.counts.sum()), held.total


def test_skew_is_that_of_applied_events_by_the_time_of_the_broker() -> None:
    """Two events arrive 3 s late and one 5 minutes early; a repeated event and a deletion have no skew."""
    late = [action(0, NOW_MS - 5_000, NOW_MS - 2_000), action(1, NOW_MS - 4_000, NOW_MS - 1_000)]
    again = action(2, NOW_MS - 4_000, NOW_MS)
    early = action(3, NOW_MS + 300_000, NOW_MS)
    deletion = Fetched(b"ann", None, 4, NOW_MS, LOG_APPEND_TIME)
    metrics, owned = ingested(late, [again, early, deletion])
    assert seconds(metrics.skew_behind_seconds) == (2, pytest.approx(6.0))
    assert seconds(metrics.skew_ahead_seconds) == (1, pytest.approx(300.0))
    assert owned.next_offset == 5


def test_without_the_time_of_the_broker_the_present_counts() -> None:
    """A producer's own time of a record, an hour wrong, is not taken for its arrival."""
    wrong = action(0, NOW_MS - 5_000, NOW_MS - 3_600_000, CREATE_TIME)
    metrics, owned = ingested([wrong])
    assert seconds(metrics.skew_behind_seconds) == (1, pytest.approx(5.0))
    assert owned.state.begin_job([b"ann"]).arrival_ms.tolist() == [NOW_MS]


def test_a_job_has_the_arrival_of_its_last_event() -> None:
    """A late event is the one that the next embedding adds, so its arrival counts, not that of the newest action."""
    metrics, owned = ingested([action(0, NOW_MS - 10, NOW_MS - 9)], [action(1, NOW_MS - 500, NOW_MS - 3)])
    job = owned.state.begin_job([b"ann"])
    assert (job.arrival_ms.tolist(), job.newest_event_ms.tolist()) == ([NOW_MS - 3], [NOW_MS - 10])
    assert metrics.late_inserted.value() == 1
    assert np.array_equal(job.select(np.array([0])).arrival_ms, job.arrival_ms)


def test_a_checkpoint_names_the_last_record_also_a_rejected_one() -> None:
    """The mark holds the last visible record; one without anything visible after it keeps what it had."""
    bad = Fetched(b"ann", b"no JSON", 1, NOW_MS, LOG_APPEND_TIME)
    metrics, owned = ingested([action(0, NOW_MS, NOW_MS), bad])
    assert owned.next_mark().last == LastRecord.of(bad)
    assert metrics.rejected.value(reason="not-json") == 1
    owned.last_record, owned.mark = None, CheckpointMark(0, 0, last=LastRecord(0, 5))
    assert owned.next_mark().last == LastRecord(0, 5)


def test_who_is_cold_is_looked_up_once_per_batch() -> None:
    """A batch of hot, cold and misplaced users asks once who is not in memory, and loads exactly who is left."""
    users = [b"%d" % number for number in range(40)]
    here = [user for user in users if int(partitions_of([user], 2)[0]) == 0][:5]
    wrong = next(user for user in users if int(partitions_of([user], 2)[0]) == 1)
    around, asked = Around(), list[list[bytes]]()
    around.source_partitions = 2
    state, fakes = around.owned.state, cast(Any, around)
    missing = state.missing

    def looked_up(of: Sequence[bytes]) -> list[bytes]:
        asked.append(list(of))
        return missing(of)

    cast(Any, state).missing = looked_up
    metrics = Metrics()
    ingest = Ingest(
        fakes, fakes, fakes, metrics, limits=DecodeLimits(), checkpoint_events_max=100, now_ms=lambda: NOW_MS
    )
    for begin, acting in enumerate(([here[0], here[0]], [*here, wrong, *here, wrong])):
        records = [action(10 * begin + at, NOW_MS + at, NOW_MS, user=user) for at, user in enumerate(acting)]
        asyncio.run(ingest.on_batch(RecordBatch(TOPIC, records[0].offset, records[-1].offset + 1, records, 0)))
    assert len(asked) == 2
    assert missing([*here, wrong]) == [wrong]
    assert state.hot_users == len(here)
    assert metrics.rejected.value(reason="wrong-partition") == 2
