"""What the partitions of a worker need: their names and limits, and the worker as they see it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from streams.core.partition_state import PartitionState
from streams.engine.clients import KAFKA, Clients
from streams.engine.own_records import Published
from streams.engine.ownership import OwnedPartition
from streams.engine.topic_limits import TopicLimits
from streams.storage.codec import CheckpointMark
from streams.storage.store import PartitionStore


@dataclass(frozen=True, slots=True)
class PartitionsConfig:
    """Names, connection and limits for acquiring and checkpointing partitions."""

    app_id: str
    source_topic: str
    changelog_topic: str
    client: Mapping[str, Any]
    """Connection options of aiokafka: servers and security."""
    data_dir: Path
    checkpoint_interval_ms: int
    transaction_timeout_ms: int
    session_timeout_ms: int
    source_partitions: int = 0
    """Number of partitions of the source topic, against which the placement of users is checked; 0 checks nothing."""
    layout: str = ""
    """Sizes of the stored sequences, by `streams.storage.identity.layout_of`."""
    limits: TopicLimits = field(default_factory=lambda: TopicLimits({}, ()))
    """Sizes that the topics accept."""
    restores_max: int = 2
    """Maximum number of partitions restored at the same time."""
    clients: Clients = KAFKA


class PartitionHost(Protocol):
    """The worker as its partitions see it: it provides their parts, and they report events to it."""

    def new_state(self) -> PartitionState:
        """Return an empty state."""
        ...

    def open_store(self, path: Path) -> PartitionStore:
        """Open or create the local database at `path`."""
        ...

    def destroy_store(self, path: Path) -> None:
        """Delete the local database at `path`, so that the next one is empty."""
        ...

    def published_since(self, partition: int, mark: CheckpointMark) -> list[AsyncGenerator[Published] | None]:
        """Return what yields the embeddings and the features published after a mark; None where there is no topic."""
        ...

    def on_ready(self, owned: OwnedPartition) -> None:
        """Begin to process a partition."""
        ...

    async def on_revoking(self, owned: Collection[OwnedPartition]) -> None:
        """Stop taking work for these partitions, and let work in flight finish within bounded time."""
        ...

    def on_lost(self, owned: OwnedPartition) -> None:
        """Stop taking work for a partition that already has a new owner."""
        ...

    def abort(self, reason: str) -> None:
        """End the process at once, because continuing would risk an event."""
        ...
