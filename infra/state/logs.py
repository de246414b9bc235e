"""The logs of an application as its operator sees them: changelog, source topic and consumer group."""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiokafka
import kafka
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from infra.errors import InfraError, detail
from streams.config.settings import Settings
from streams.core.layout import StateLimits
from streams.engine.changelog import LogReader
from streams.engine.cluster import Cluster, ClusterView, partition_count_problem
from streams.engine.compat import install_overrides
from streams.engine.last_record import reread
from streams.engine.proof import Found, Names
from streams.engine.restore import restore
from streams.storage.codec import MARK_KEY, CheckpointMark, decode_mark
from streams.storage.identity import Identity, layout_of
from streams.storage.store import PartitionStore

TAIL_OFFSETS = 1_000
"""Offsets at the end of a changelog that are searched for its mark first."""
SLACK_S = 3.0
"""Time beyond a session until the coordinator has removed a member."""


@dataclass(frozen=True, slots=True)
class Application:
    """One application: its settings and what the broker reports about its topics."""

    settings: Settings
    view: ClusterView

    @classmethod
    async def open(cls, settings: Settings) -> Application:
        """Ask the broker; raise `InfraError` if a topic is missing or has another partition count."""
        install_overrides()
        topics = settings.topics
        names = [topics.actions, settings.changelog_topic, topics.embeddings]
        cluster = Cluster(settings.kafka.client_options())
        try:
            view = await cluster.view(names)
        except Exception as error:
            raise InfraError(
                f"no Kafka broker answers at {settings.kafka.bootstrap_servers}", detail(error), "check the address"
            ) from error
        finally:
            cluster.close()
        return cls(settings, view)

    def require_topics(self) -> None:
        """Raise `InfraError` unless source, changelog and output topic have the partition count of the settings."""
        topics = self.settings.topics
        problems = []
        for name in (topics.actions, self.settings.changelog_topic, topics.embeddings):
            topic = self.view.topics.get(name)
            if topic is None:
                problems.append(f"{name} is missing: create it with `streamformer topics create`")
            elif topic.partitions != topics.partitions:
                problems.append(partition_count_problem(name, topic.partitions, topics.partitions))
        if problems:
            raise InfraError("topics do not match the settings", " | ".join(problems))

    @property
    def client(self) -> Mapping[str, Any]:
        """Connection options of aiokafka."""
        return self.settings.kafka.client_options()

    @property
    def limits(self) -> StateLimits:
        """Sizes of the sequences."""
        state = self.settings.state
        return StateLimits(sequence_length=state.sequence_length, chunk_length=state.chunk_length)

    @property
    def identity(self) -> Identity:
        """Identity that a worker with these settings would find."""
        source, changelog = self.settings.topics.actions, self.settings.changelog_topic
        return self.view.identity(source=source, changelog=changelog, layout=layout_of(self.limits))

    def partitions(self, topic: str) -> range:
        """Return the numbers of the partitions of a topic; none if it does not exist."""
        view = self.view.topics.get(topic)
        return range(view.partitions if view else 0)

    def names(self, partition: int) -> Names:
        """Return the names for messages about one partition."""
        settings = self.settings
        return Names(settings.app_id, settings.topics.actions, settings.changelog_topic, partition)

    async def found(self, partition: int) -> Found:
        """Return what a worker would find in one partition; committed offset before mark, as both only advance."""
        source = TopicPartition(self.settings.topics.actions, partition)
        committed, metadata = (await self.committed()).get(partition, (None, ""))
        mark = await self.last_mark(partition)
        async with aiokafka.AIOKafkaConsumer(isolation_level="read_committed", **self.client) as consumer:
            earliest = (await consumer.beginning_offsets([source]))[source]
            end = (await consumer.end_offsets([source]))[source]
        last = await reread(source, self.client, mark, earliest, end)
        return Found(mark, committed, metadata, earliest, end, self.identity, last)

    async def committed(self) -> dict[int, tuple[int | None, str]]:
        """Return the group's committed offset and its metadata, per source partition that has one."""
        with self.admin() as admin:
            offsets = admin.list_group_offsets(self.settings.app_id)[self.settings.app_id]
        topic = self.settings.topics.actions
        return {
            tp.partition: (each.offset, each.metadata or "")
            for tp, each in offsets.items()
            if tp.topic == topic and each.offset >= 0
        }

    async def last_mark(self, partition: int) -> CheckpointMark | None:
        """Return the newest mark of a changelog partition; it is near the end, so the search begins there."""
        reader = LogReader(TopicPartition(self.settings.changelog_topic, partition), self.client)
        span = TAIL_OFFSETS
        try:
            await reader.open()
            while True:
                start = max(reader.begin, reader.end - span)
                value = None
                async for records in reader.batches(start, records_max=5_000):
                    value = next((each.value for each in reversed(records) if each.key == MARK_KEY), value)
                if value is not None:
                    return decode_mark(value)
                if start == reader.begin:
                    return None
                span *= 8
        finally:
            await reader.close()

    @asynccontextmanager
    async def restored(self, partition: int) -> AsyncIterator[PartitionStore]:
        """Restore a changelog partition into a temporary database, which disappears at the end of the block."""
        with tempfile.TemporaryDirectory(prefix="streamformer-state-") as folder:
            store = await restore(
                Path(folder) / str(partition),
                PartitionStore.open,
                TopicPartition(self.settings.changelog_topic, partition),
                self.client,
                on_progress=lambda records, remaining: None,
            )
            try:
                yield store
            finally:
                store.close()

    @contextmanager
    def admin(self) -> Iterator[Any]:
        """Yield an admin client."""
        admin = kafka.KafkaAdminClient(**self.client)
        try:
            yield admin
        finally:
            admin.close()

    def require_no_workers(self) -> None:
        """Return once the group has no member; raise `InfraError` if that takes longer than a session lasts.

        A worker that was stopped or killed stays a member until its session has expired, because it is a static one.
        """
        group, until_s = (
            self.settings.app_id,
            time.monotonic() + self.settings.kafka.session_timeout_ms / 1000 + SLACK_S,
        )
        with self.admin() as admin:
            while members := len(admin.describe_groups([group]).get(group, {}).get("members") or ()):
                if time.monotonic() > until_s:
                    raise InfraError(
                        f"{members} workers of {group} are running",
                        "they would write what is to be rewritten",
                        "stop every worker of this application, then run this again",
                    )
                time.sleep(0.5)


@contextmanager
def broker_errors(what: str) -> Iterator[None]:
    """Raise a failure of the broker as one line."""
    try:
        yield
    except (KafkaError, kafka.errors.KafkaError) as error:
        raise InfraError(
            what, detail(error), "check the broker and this user's permissions, then run it again"
        ) from error
