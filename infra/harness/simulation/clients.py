"""Clients of the broker in memory, in the shape of aiokafka's, over links that a history can hold, break and cut."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Self

from aiokafka.errors import KafkaError, KafkaTimeoutError, OffsetOutOfRangeError
from aiokafka.structs import TopicPartition

from infra.harness.simulation.broker import Record, size_of
from infra.harness.simulation.link import CHANGELOG, OTHER, OUTPUT, Link
from streams.engine.clients import Clients
from streams.engine.cluster import Cluster, ClusterView, TopicView
from streams.wire.embeddings import Message


def clients_of(link: Link) -> Clients:
    """Return the clients of one worker."""
    return Clients(partial(Producer, link), partial(Consumer, link), partial(SimulatedCluster, link))


class Batch:
    """Messages of one produce request."""

    def __init__(self, bytes_max: int) -> None:
        self.messages: list[Message] = []
        self._bytes_max = bytes_max

    def append(self, *, timestamp: Any, key: bytes | None, value: bytes | None, headers: Any) -> object | None:
        """Add a message; return None if there is no room, except for the first."""
        if self.messages and size_of([*self.messages, (key, value, headers)]) > self._bytes_max:
            return None
        self.messages.append((key, value, list(headers)))
        return self

    def record_count(self) -> int:
        """Return the number of messages."""
        return len(self.messages)

    def close(self) -> None:
        """Do nothing."""


class Producer:
    """An idempotent or transactional producer; it counts a batch when it is sent, not when it is accepted."""

    def __init__(
        self, link: Link, *, transactional_id: str | None = None, max_batch_size: int = 16_384, **options: Any
    ) -> None:
        self._link, self._bytes_max = link, max_batch_size
        self._kind = OUTPUT if transactional_id is None else CHANGELOG
        self._txn_manager = SimpleNamespace(transactional_id=transactional_id)
        self._id = 0
        self._sent: dict[TopicPartition, int] = {}
        self._in_flight: set[asyncio.Future[Any]] = set()
        self._message_accumulator = self
        self._sender = SimpleNamespace(sender_task=None)
        self.client = self

    async def start(self) -> None:
        """Get a number from the broker, which fences every predecessor with the same transactional id."""
        broker = self._link.broker
        self._id = await self._link.call(OTHER, lambda: broker.start_producer(self._txn_manager.transactional_id))
        self._link.producers.add(self._id)

    async def stop(self) -> None:
        """Wait for the results of everything in flight."""
        if self._in_flight:
            await asyncio.wait(self._in_flight)

    def fail_all(self, error: Exception) -> None:
        """Fail everything in flight."""
        for each in list(self._in_flight):
            if not each.done():
                each.set_exception(error)
                each.exception()  # nobody may be left who waits for it

    async def close(self) -> None:
        """Close the connections."""

    def create_batch(self) -> Batch:
        """Return an empty batch."""
        return Batch(self._bytes_max)

    async def send_batch(self, batch: Batch, topic: str, *, partition: int) -> asyncio.Future[Any]:
        """Send a batch; its result comes later."""
        tp = TopicPartition(topic, partition)
        first = self._sent.get(tp, 0)
        self._sent[tp] = first + len(batch.messages)
        broker, messages = self._link.broker, list(batch.messages)

        def apply() -> Any:
            return SimpleNamespace(offset=broker.produce(self._id, tp, first, messages))

        answer = self._link.send(self._kind, apply, topic, messages)
        self._in_flight.add(answer)
        answer.add_done_callback(self._in_flight.discard)
        return answer

    async def begin_transaction(self) -> None:
        """Do nothing: the broker learns of a transaction by its first record."""

    async def send_offsets_to_transaction(self, offsets: Mapping[TopicPartition, tuple[int, str]], group: str) -> None:
        """Add offsets to the transaction."""
        broker, given = self._link.broker, dict(offsets)
        await self._link.call(self._kind, lambda: broker.add_offsets(self._id, group, given))

    async def commit_transaction(self) -> None:
        """Commit the transaction."""
        await self._link.call(self._kind, lambda: self._link.broker.end_transaction(self._id, commit=True))

    async def abort_transaction(self) -> None:
        """Abort the transaction."""
        await self._link.call(self._kind, lambda: self._link.broker.end_transaction(self._id, commit=False))


@dataclass(slots=True)
class Position:
    """Where a consumer is in one partition; the names are aiokafka's."""

    _position: int | None = None
    lso: int | None = None
    highwater: int | None = None


@dataclass(frozen=True, slots=True)
class Assignment:
    """The assigned partitions; the names are aiokafka's."""

    tps: dict[Any, Position]

    def state_value(self, tp: Any) -> Position:
        """Return the position of a partition."""
        return self.tps[tp]


class Consumer:
    """A consumer of assigned partitions, and what the worker reads of aiokafka's own insides."""

    def __init__(
        self,
        link: Link,
        *,
        isolation_level: str = "read_uncommitted",
        group_id: str | None = None,
        auto_offset_reset: str = "latest",
        **options: Any,
    ) -> None:
        self._link, self._group, self._reset = link, group_id, auto_offset_reset
        self._isolation_level = isolation_level
        self._key_deserializer: Any = None
        self._positions: dict[Any, Position] = {}
        self._closed = False
        self._fetcher = self._coordinator = self
        subscription = SimpleNamespace(assignment=Assignment(self._positions))
        self._subscriptions = SimpleNamespace(fetch_context=nullcontext, subscription=subscription)
        self._paused: set[Any] = set()

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Stop."""
        await self.stop()

    async def start(self) -> None:
        """Do nothing."""

    async def stop(self) -> None:
        """Do nothing."""

    def assign(self, tps: Collection[Any]) -> None:
        """Read these partitions."""
        self._positions.clear()
        self._positions |= {tp: Position() for tp in tps}

    def assignment(self) -> Collection[Any]:
        """Return the assigned partitions."""
        return self._positions.keys()

    def pause(self, *tps: Any) -> None:
        """Fetch these no more."""
        self._paused |= set(tps)

    def resume(self, *tps: Any) -> None:
        """Fetch these again."""
        self._paused -= set(tps)

    async def beginning_offsets(self, tps: Collection[Any]) -> dict[Any, int]:
        """Return the first offset of each partition."""
        broker = self._link.broker
        found: dict[Any, int] = await self._link.call(OTHER, lambda: {tp: broker.log(tp).begin for tp in tps})
        return found

    async def end_offsets(self, tps: Collection[Any]) -> dict[Any, int]:
        """Return the end of each partition, as the isolation level sees it."""
        broker, committed = self._link.broker, self._isolation_level == "read_committed"

        def ends() -> dict[Any, int]:
            return {tp: broker.log(tp).stable if committed else broker.log(tp).end for tp in tps}

        found: dict[Any, int] = await self._link.call(OTHER, ends)
        return found

    async def committed(self, tp: TopicPartition) -> int | None:
        """Return the committed offset of the group."""
        found = self._link.broker.committed.get((str(self._group), tp))
        return None if found is None else found[0]

    def seek(self, tp: Any, offset: int) -> None:
        """Go on at another offset."""
        self._positions[tp]._position = offset

    async def position(self, tp: Any) -> int:
        """Return the offset of the next fetch."""
        position = self._positions[tp]._position
        if position is None:
            position = self._link.broker.log(tp).begin
        return position

    async def getmany(self, tp: Any, *, timeout_ms: int, max_records: int) -> dict[Any, list[Record]]:
        """Return records of a partition, if there are any."""
        await asyncio.sleep(0)
        found: dict[Any, list[Record]] = await self._link.call(OTHER, lambda: self._fetch([tp], max_records))
        return found

    # -- what the worker's thread reads of aiokafka's fetcher, subscription and coordinator

    async def fetched_records(
        self, tps: Collection[Any], timeout: float | None, max_records: int | None
    ) -> dict[Any, list[Record]]:
        """Return records of those of the partitions that are not paused."""
        return self._fetch([tp for tp in sorted(tps) if tp not in self._paused], max_records or 1 << 30)

    async def fetch_committed_offsets(self, tps: Collection[Any]) -> dict[Any, Any]:
        """Return the offsets that the group has committed, with their metadata."""
        committed = self._link.broker.committed
        found = {tp: committed.get((str(self._group), TopicPartition(*tp)), (-1, "")) for tp in tps}
        return {tp: SimpleNamespace(offset=offset, metadata=note) for tp, (offset, note) in found.items()}

    async def _do_heartbeat(self) -> bool:
        return self.is_member

    is_member = True

    def _fetch(self, tps: Collection[Any], records_max: int) -> dict[Any, list[Record]]:
        committed, fetched = self._isolation_level == "read_committed", dict[Any, list[Record]]()
        for tp in tps:
            state, log = self._positions[tp], self._link.broker.log(tp)
            if state._position is None:
                continue
            if not log.begin <= state._position <= log.end:
                raise OffsetOutOfRangeError({tp: state._position})
            records, after = log.read(state._position, records_max, committed=committed)
            records_max -= len(records)
            state.lso, state.highwater = log.stable, log.end
            if self._key_deserializer is not None and after > state._position:
                self._key_deserializer.reached[tp] = after
            state._position = after
            if records:
                fetched[tp] = records
        return fetched


class SimulatedCluster(Cluster):
    """The cluster as the broker in memory describes it."""

    def __init__(self, link: Link, client: Mapping[str, Any]) -> None:
        self._link = link

    async def view(self, topics: Sequence[str], *, fresh_s: float = 0.0) -> ClusterView:
        """Return the cluster with `topics`."""
        broker = self._link.broker

        def view() -> ClusterView:
            found = {name: broker.topics[name] for name in topics if name in broker.topics}
            views = {name: TopicView(each.id, len(each.logs)) for name, each in found.items()}
            return ClusterView(broker.cluster_id, views)

        described: ClusterView = await self._link.call(OTHER, view)
        return described


REFUSALS: tuple[tuple[Callable[[], Exception], bool], ...] = (
    (partial(KafkaError, "not the leader of this partition"), False),
    (partial(KafkaTimeoutError, "no answer"), False),
    (partial(KafkaTimeoutError, "no answer, although the broker has it"), True),
)
"""Ways in which a request fails: the error, and whether the broker has performed the request."""
