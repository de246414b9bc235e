"""Faust as the partitions use it, around the product's own fetching of record batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

from aiokafka.structs import TopicPartition

from infra.harness.simulation.clients import Consumer
from infra.harness.simulation.link import Link
from streams.engine.delivery import BatchConsumerThread
from streams.engine.records import Parsing

APP = "app"


class Thread(BatchConsumerThread):
    """The product's fetching of record batches, on the worker's own event loop."""

    def __init__(self, app: App, consumer: Consumer) -> None:
        self.app, self.consumer, self._consumer = app, app.consumer, consumer
        self.log = SimpleNamespace(dev=lambda *args: None)
        self._joined_at, self._epochs, self._out_of_range = {}, {}, {}
        self._parsing = Parsing(report=True)
        consumer._key_deserializer = self._parsing

    async def call_thread(self, fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the function: there is no other thread."""
        return await fun(*args, **kwargs)


class FaustConsumer:
    """Faust's consumer, as far as the partitions use it."""

    flow_active = True
    in_transaction = False

    def __init__(self) -> None:
        self._thread: Any = None
        self._read_offset: dict[TopicPartition, int] = {}
        self.paused: set[TopicPartition] = set()

    def pause_partitions(self, tps: Collection[TopicPartition]) -> None:
        """Fetch these no more."""
        self.paused |= set(tps)

    def resume_partitions(self, tps: Collection[TopicPartition]) -> None:
        """Fetch these again."""
        self.paused -= set(tps)

    async def seek_wait(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Go on at other offsets."""
        await self._thread.seek_wait(offsets)

    async def earliest_offsets(self, *tps: TopicPartition) -> Mapping[TopicPartition, int]:
        """Return the first offset of each partition."""
        found: Mapping[TopicPartition, int] = await self._thread.earliest_offsets(*tps)
        return found

    async def highwaters(self, *tps: TopicPartition) -> Mapping[TopicPartition, int]:
        """Return the end of each partition."""
        found: Mapping[TopicPartition, int] = await self._thread.highwaters(*tps)
        return found


class App:
    """Faust's app, as far as the partitions use it."""

    consumer_generation_id = 1
    rebalancing = False
    conf = SimpleNamespace(broker_request_timeout=90.0)

    def __init__(self, link: Link, tps: Collection[TopicPartition]) -> None:
        self.consumer = FaustConsumer()
        consumer = Consumer(link, isolation_level="read_committed", group_id=APP)
        consumer.assign(tps)
        self.consumer._thread = Thread(self, consumer)
