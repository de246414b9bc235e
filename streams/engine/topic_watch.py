"""Watches the logs under a running worker: what a start checks once can change afterwards.

- A topic of another partition count, or one that was deleted or created again, ends the worker with the line that a
  start gives: its users would be read by nobody, or their state mixed with that of another log.
- A position that the source log no longer has is resolved here, because the consumer never resets one by itself. If
  retention was faster than the worker, the deleted events are counted; if the log was truncated, it is halted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

from aiokafka.errors import KafkaError
from kafka.errors import KafkaError as AdminError

from streams.engine.cluster import Cluster, ClusterView, TopicsChanged, partition_count_problem
from streams.engine.ownership import OwnedPartition
from streams.engine.partitions import Partitions
from streams.engine.proof import check_identity, truncated

logger = logging.getLogger(__name__)

POSITIONS_EVERY_S = 0.5
TOPICS_EVERY_S = 15.0
MISSING_AFTER = 2
"""Observations after which a missing topic is taken as deleted; one may be a broker that is still starting."""


class TopicWatch:
    """Compares topics and positions with what the worker began with."""

    def __init__(self, partitions: Partitions, cluster: Cluster, topics: Sequence[str], partition_count: int) -> None:
        """Watch `topics`, the first of which is the source, the second the changelog."""
        self._partitions, self._cluster = partitions, cluster
        self._topics, self._partition_count = tuple(topics), partition_count
        self._missing: dict[str, int] = {}
        self._ids: dict[str, str] = {}

    async def run(self) -> NoReturn:
        """Watch until cancelled; raise `StopsWorker` when the worker must end."""
        checked_at = 0.0
        while True:
            await asyncio.sleep(POSITIONS_EVERY_S)
            try:
                for owned in list(self._partitions.ready.values()):
                    await self._resolve_position(owned)
                if time.monotonic() - checked_at >= TOPICS_EVERY_S:
                    checked_at = time.monotonic()
                    self.check(await self._cluster.view(self._topics, fresh_s=0))
            except (KafkaError, AdminError, OSError) as error:
                logger.debug("the topics could not be checked: %r", error)

    def check(self, view: ClusterView) -> None:
        """Raise `StopsWorker` if a topic is not what the worker began with."""
        problems = [problem for topic in self._topics if (problem := self._problem(topic, view))]
        if problems:
            remedy = "stop the workers and change the topics, or the settings"
            raise TopicsChanged("topics do not match the settings", " | ".join(problems), remedy)
        self._check_ids(view)

    def _problem(self, topic: str, view: ClusterView) -> str:
        found = view.topics.get(topic)
        self._missing[topic] = 0 if found else self._missing.get(topic, 0) + 1
        if found is None:
            is_gone = topic in self._ids and self._missing[topic] >= MISSING_AFTER
            return f"{topic} is missing: create it with `streamformer topics create`" if is_gone else ""
        if found.partitions != self._partition_count:
            return partition_count_problem(topic, found.partitions, self._partition_count)
        return ""

    def _check_ids(self, view: ClusterView) -> None:
        """Raise `WrongIdentity` for another source or changelog; another output topic is only reported."""
        source, changelog, *outputs = self._topics
        for owned in self._partitions.ready.values():
            if held := owned.mark.identity:
                found = view.identity(source=source, changelog=changelog, layout=held.layout)
                check_identity(self._partitions.names(owned.tp.partition), owned.next_mark(), found)
        for topic in self._topics:
            now, before = _id(view.topics, topic), self._ids.get(topic)
            if topic in outputs and before and now and before != now:
                logger.error(
                    "the topic %s was created again (its id was %s and is %s): users that do not act any more have no "
                    "record in it",
                    topic,
                    before,
                    now,
                )
            if topic in view.topics:
                self._ids[topic] = now

    async def _resolve_position(self, owned: OwnedPartition) -> None:
        """Continue at the first offset that still exists, and count what is gone; raise if the log was truncated."""
        position = self._partitions.app.consumer._thread.out_of_range(owned.tp)
        if position is None or owned.tp.partition in self._partitions.halted or owned.next_offset < position:
            return  # batches from before the position are still to be processed
        earliest, end = await self._partitions.bounds(owned.tp, position)
        if self._partitions.ready.get(owned.tp.partition) is not owned or owned.next_offset != position:
            return
        number = owned.tp.partition
        if position > end:
            self.check(await self._cluster.view(self._topics, fresh_s=0))
            self._partitions.halt(number, str(truncated(self._partitions.names(number), position, end)), refused=True)
            return
        if position < earliest:
            self._partitions.report_expired(number, earliest - position, position)
        await self._partitions.continue_at(owned, max(position, earliest))


def _id(topics: Mapping[str, object], topic: str) -> str:
    return str(getattr(topics.get(topic), "id", ""))
