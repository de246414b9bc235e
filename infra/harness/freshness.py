"""Freshness from outside: from handing an event to Kafka to having received an embedding that contains it.

An embedding names the newest event that it contains by partition and `source-offset`, and it contains every event of
its user up to there. Producer and consumer are one process with one clock: the event times of a replayed log are
history.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from aiokafka.structs import TopicPartition

from encoder.arrays import F64, I64
from infra.errors import InfraError
from infra.harness.safe_consumer import SafeConsumer

FETCH_WAIT_MS = 100
RECORDS_MAX = 2_000
OFFSET_BITS = 32
"""A user's number and an offset share one 64-bit key; a run sends fewer events than that."""


class ForeignEvents(InfraError):
    """Another producer writes to the topic, so offsets do not identify our events."""


class Sent:
    """Time and user of each event handed to the producer, by partition and offset."""

    def __init__(self, ends: Sequence[int]) -> None:
        """Take the end offset of each partition before the first event."""
        self._begins = list(ends)
        self._users = [array("q") for _ in ends]
        self._at_s = [array("d") for _ in ends]

    def __len__(self) -> int:
        return sum(map(len, self._at_s))

    def add(self, partition: int, base_offset: int, users: Sequence[int], at_s: float) -> None:
        """Add events of `users` (numbers) from `base_offset` on; raise `ForeignEvents` if that is not the next one."""
        expected = self.end(partition)
        if base_offset != expected:
            raise ForeignEvents(
                "another producer writes to the topic of actions",
                f"offset {base_offset} of partition {partition} where {expected} was next",
                "leave the topic to this command while it runs",
            )
        self._users[partition].extend(users)
        self._at_s[partition].extend([at_s] * len(users))

    def end(self, partition: int) -> int:
        """Return the offset of the next event of a partition."""
        return self._begins[partition] + len(self._at_s[partition])

    def at_s(self, partition: I64, offset: I64) -> F64:
        """Return when the events at these places were sent, in seconds since the epoch; NaN where none is known."""
        result = np.full(len(partition), np.nan)
        for number, begin in enumerate(self._begins):
            rows = np.flatnonzero((partition == number) & (offset >= begin) & (offset < self.end(number)))
            result[rows] = np.array(self._at_s[number])[offset[rows] - begin]
        return result

    def columns(self) -> tuple[I64, F64]:
        """Return (key, time sent) of every event, one partition after the other; see `key_of`."""
        keys = [
            key_of(np.array(users, np.int64), begin + np.arange(len(users)))
            for users, begin in zip(self._users, self._begins, strict=True)
        ]
        return np.concatenate(keys), np.concatenate([np.array(at_s, np.float64) for at_s in self._at_s])


@dataclass(frozen=True, slots=True)
class Embeddings:
    """E received embeddings in order of arrival, as columns."""

    user: I64
    partition: I64
    source_offset: I64
    event_time_ms: I64
    at_s: F64
    """[E] when each was received, in seconds since the epoch."""

    def __len__(self) -> int:
        return len(self.user)

    def freshness_ms(self, sent: Sent) -> F64:
        """[E] Return received minus sent of the newest event inside; NaN where that event is not known."""
        return (self.at_s - sent.at_s(self.partition, self.source_offset)) * 1_000


class Received:
    """Embeddings as they arrive."""

    def __init__(self) -> None:
        self._integers = [array("q") for _ in range(4)]
        self._at_s = array("d")

    def __len__(self) -> int:
        return len(self._at_s)

    def add(self, user: int, partition: int, source_offset: int, event_time_ms: int, at_s: float) -> None:
        """Add one embedding."""
        for column, value in zip(self._integers, (user, partition, source_offset, event_time_ms), strict=True):
            column.append(value)
        self._at_s.append(at_s)

    def columns(self, begin: int = 0) -> Embeddings:
        """Return the embeddings from number `begin` on."""
        user, partition, source_offset, event_time_ms = (np.array(one[begin:], np.int64) for one in self._integers)
        return Embeddings(user, partition, source_offset, event_time_ms, np.array(self._at_s[begin:], np.float64))


def key_of(user: I64, offset: I64) -> I64:
    """Return one sortable integer for (user, offset)."""
    return user << OFFSET_BITS | offset


def served_s(sent: I64, received: I64, received_s: F64) -> F64:
    """Return when each sent key was served: by the first embedding of its user with the same or a later offset.

    >>> one, two = 1 << OFFSET_BITS, 2 << OFFSET_BITS
    >>> served_s(np.array([one + 5, one + 6, two + 7]), np.array([one + 6]), np.array([10.0])).tolist()
    [10.0, 10.0, nan]
    """
    order = np.lexsort((received_s, received))
    keys, times = received[order], received_s[order]
    # Offsets of a user rise, so the first embedding that contains an event has the next key from the event on.
    at = np.searchsorted(keys, sent, side="left")
    known = np.minimum(at, max(0, len(keys) - 1))
    served = np.full(len(sent), np.nan)
    if len(keys):
        hit = (at < len(keys)) & (keys[known] >> OFFSET_BITS == sent >> OFFSET_BITS)
        served[hit] = times[known[hit]]
    return served


def percentiles(values: F64, *percents: float) -> tuple[float, ...]:
    """Return percentiles of the values that are numbers; NaN if there are none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return (float("nan"),) * len(percents)
    return tuple(float(value) for value in np.percentile(known, percents))


Take = Callable[[int, Sequence[Any], float], None]
"""Receives (partition, records, time of arrival)."""


@asynccontextmanager
async def reading(
    topic: str, partitions: int, client: Mapping[str, Any], take: Take, *, from_end: bool
) -> AsyncIterator[Callable[[], None]]:
    """Pass the records of a topic to `take` as they arrive, in the event loop, until the end of the block.

    Header names may be any bytes, and a damaged batch is skipped with a line in the log. The yielded function raises
    what reading has failed with, if anything. Every partition has a consumer of its own: a single one would hold new
    records of a partition back while it waits for those of the others.
    """
    async with AsyncExitStack() as stack:
        consumers = [
            await _consumer(stack, TopicPartition(topic, number), client, from_end) for number in range(partitions)
        ]
        tasks = [asyncio.create_task(_read(number, consumer, take)) for number, consumer in enumerate(consumers)]

        def require() -> None:
            for task in tasks:
                if task.done():
                    task.result()

        try:
            yield require
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _read(partition: int, consumer: SafeConsumer, take: Take) -> None:
    while True:
        fetched = await consumer.take(timeout_ms=1_000, records_max=RECORDS_MAX)
        at_s = time.time()
        for records in fetched.values():
            take(partition, records, at_s)


async def _consumer(
    stack: AsyncExitStack, place: TopicPartition, client: Mapping[str, Any], from_end: bool
) -> SafeConsumer:
    reader = await stack.enter_async_context(
        SafeConsumer(client, auto_offset_reset="earliest", fetch_max_wait_ms=FETCH_WAIT_MS)
    )
    reader.consumer.assign([place])
    if from_end:
        await reader.consumer.seek_to_end(place)
        await reader.consumer.position(place)
    return reader
