"""Bursts of events for the stream benchmarks: the users that act, the events, and the way to the broker.

A burst is first built as Kafka record batches and then appended as fast as the broker accepts it, so that its reader
always has more to read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from aiokafka import AIOKafkaProducer
from aiokafka.partitioner import murmur2

from encoder.arrays import I64

ITEMS = 50_000
ACTIONS = ("view", "click", "save", "share")
BATCH_BYTES_MAX = 900_000
IN_FLIGHT_BATCHES = 16
SPAN_MS = 500
"""Event time that a burst covers; less than the time between two bursts."""


def zipf_users(rng: np.random.Generator, users: int, events: int) -> I64:
    """Return users of whom a few act often and most rarely: floor(users x r^3), r uniform in [0, 1)."""
    return (users * rng.random(events) ** 3).astype(np.int64)


def distinct_users(rng: np.random.Generator, users: int, events: int) -> I64:
    """Return every user once, in a random order that repeats: any `users` events in a row are of distinct users."""
    order = rng.permutation(users)
    return np.resize(order, events)


class Burst:
    """Events of `users` (numbers), ready to be appended to a topic once."""

    def __init__(
        self, users: I64, partitions: int, *, seed: int, times_ms: I64 | None = None, with_values: bool = False
    ) -> None:
        """Prepare one event of each of `users` [N], at `times_ms` [N] if given; `with_values` adds the number `value`.

        Without times, event time rises over `SPAN_MS` to the present, so no event is late.
        """
        self.events = len(users)
        self._users, self._partitions, self._seed = users, partitions, seed
        self._times_ms, self._with_values = times_ms, with_values

    async def append(self, topic: str, client: Mapping[str, Any]) -> float:
        """Append all events and return the seconds from the first to the last acknowledgement."""
        producer = AIOKafkaProducer(**client, max_batch_size=BATCH_BYTES_MAX, linger_ms=0, acks="all")
        await producer.start()
        try:
            batches = list(self._batches(producer))
            started_s = time.monotonic()
            await _send(producer, topic, batches)
            return time.monotonic() - started_s
        finally:
            await producer.stop()

    def _batches(self, producer: AIOKafkaProducer) -> Iterator[tuple[int, Any]]:
        """Yield (partition, record batch), the partitions in turn so that all of them grow together."""
        present, rows = np.unique(self._users, return_inverse=True)
        names = [b"user-%d" % number for number in present.tolist()]
        partitions = [(murmur2(name) & 0x7FFFFFFF) % self._partitions for name in names]
        open_batches = [producer.create_batch() for _ in range(self._partitions)]
        for row, value in zip(rows.tolist(), self._values(), strict=True):
            partition = partitions[row]
            batch = open_batches[partition]
            if batch.append(timestamp=None, key=names[row], value=value) is None:
                yield partition, batch
                batch = open_batches[partition] = producer.create_batch()
                batch.append(timestamp=None, key=names[row], value=value)
        yield from ((partition, batch) for partition, batch in enumerate(open_batches) if batch.record_count())

    def _values(self) -> Iterator[bytes]:
        """Yield the JSON of each event."""
        rng = np.random.default_rng(self._seed)
        items = rng.integers(ITEMS, size=self.events).tolist()
        actions = rng.choice(len(ACTIONS), size=self.events, p=(0.62, 0.25, 0.1, 0.03)).tolist()
        durations_ms = rng.integers(60_000, size=self.events).tolist()
        values = [b""] * self.events
        if self._with_values:
            values = [b',"value":%d.99' % number for number in rng.integers(500, size=self.events).tolist()]
        times_ms = self._times_ms if self._times_ms is not None else _present(self.events)
        for row, (user, item, action, time_ms, duration_ms, value) in enumerate(
            zip(self._users.tolist(), items, actions, times_ms.tolist(), durations_ms, values, strict=True)
        ):
            yield (
                b'{"user_id":"user-%d","item_id":"item-%d","action":"%s","timestamp_ms":%d,"surface":"home",'
                b'"duration_ms":%d,"event_id":"%x-%d"%s}'
            ) % (user, item, ACTIONS[action].encode(), time_ms, duration_ms, self._seed, row, value)


def _present(events: int) -> I64:
    now_ms = time.time_ns() // 1_000_000
    return np.linspace(now_ms - SPAN_MS, now_ms, events).astype(np.int64)


async def _send(producer: AIOKafkaProducer, topic: str, batches: Sequence[tuple[int, Any]]) -> None:
    pending: set[asyncio.Future[Any]] = set()
    for partition, batch in batches:
        batch.close()
        if len(pending) >= IN_FLIGHT_BATCHES:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
        pending.add(await producer.send_batch(batch, topic, partition=partition))
    await asyncio.gather(*pending)
