"""What the broker reports about the cluster and its topics: cluster id, topic ids and partition counts.

aiokafka does not read topic ids, so kafka-python's admin client does. It blocks, so it runs in a daemon thread: a
broker that does not answer delays neither the event loop nor the end of the process.
"""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

import kafka

from streams.errors import StopsWorker
from streams.storage.identity import Identity

ANSWER_MS = 5_000
"""Time that the broker has to respond."""
FRESH_S = 1.0
"""Age up to which an answer is used again, so that partitions that are acquired together ask once."""
T = TypeVar("T")


class TopicsChanged(StopsWorker):
    """The topics that this worker reads or writes are no longer those that it began with."""


@dataclass(frozen=True, slots=True)
class TopicView:
    """A topic as the broker describes it."""

    id: str
    """Topic id as Kafka's tools print it; empty with a broker before 2.8."""
    partitions: int


@dataclass(frozen=True, slots=True)
class ClusterView:
    """A cluster and some of its topics, as one moment saw them."""

    cluster_id: str
    topics: Mapping[str, TopicView]
    """Topics by name; one that does not exist, or that this client may not describe, is absent."""

    def identity(self, *, source: str, changelog: str, layout: str) -> Identity:
        """Return the identity of a state with this source topic and changelog."""
        ids = {name: topic.id for name, topic in self.topics.items()}
        return Identity(self.cluster_id, source, ids.get(source, ""), ids.get(changelog, ""), layout)


class Cluster:
    """Describes topics of one cluster, over one connection."""

    def __init__(self, client: Mapping[str, Any]) -> None:
        self._client = dict(client)
        self._admin: Any = None
        self._cluster_id = ""
        self._lock = asyncio.Lock()
        self._seen: dict[tuple[str, ...], tuple[float, ClusterView]] = {}

    async def view(self, topics: Sequence[str], *, fresh_s: float = FRESH_S) -> ClusterView:
        """Return the cluster with `topics`; raise `KafkaError` of kafka-python when no broker answers."""
        names = tuple(sorted(topics))
        async with self._lock:
            at, view = self._seen.get(names, (0.0, None))
            if view is None or time.monotonic() - at > fresh_s:
                view = await in_daemon_thread(lambda: self.describe(names))
                self._seen[names] = time.monotonic(), view
        return view

    def describe(self, topics: Sequence[str]) -> ClusterView:
        """Ask the broker, and wait for its answer."""
        try:
            if self._admin is None:
                self._admin = kafka.KafkaAdminClient(
                    bootstrap_timeout_ms=ANSWER_MS, request_timeout_ms=ANSWER_MS, **self._client
                )
            self._cluster_id = self._cluster_id or str(self._admin.describe_cluster()["cluster_id"] or "")
            described = self._admin.describe_topics(list(topics))
        except BaseException:
            self.close()
            raise
        present = [each for each in described if not each.get("error_code") and each["partitions"]]
        views = {each["name"]: TopicView(_id(each.get("topic_id")), len(each["partitions"])) for each in present}
        return ClusterView(self._cluster_id, views)

    def close(self) -> None:
        """Close the connection; the next call opens another one."""
        admin, self._admin = self._admin, None
        if admin is not None:
            with suppress(Exception):
                admin.close()


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns in a thread of its own; a cancelled caller leaves the thread to its end."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        with suppress(RuntimeError):  # the loop was closed in the meantime
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="cluster", daemon=True).start()
    return await done


def partition_count_problem(topic: str, found: int, wanted: int) -> str:
    """Return the line about a topic with another number of partitions than the settings say."""
    return (
        f"{topic} has {found} partitions where the settings say {wanted}: set topics.partitions to {found}, or delete "
        "the topics of this application and create them again; to keep every sequence with another number of "
        "partitions, see `streamformer state adopt --help`"
    )


def _id(reported: Any) -> str:
    """Return a topic id as Kafka's tools print it: base64 for URLs, without padding; empty without one."""
    topic_id = UUID(str(reported)) if reported else UUID(int=0)
    return base64.urlsafe_b64encode(topic_id.bytes).rstrip(b"=").decode() if topic_id.int else ""
