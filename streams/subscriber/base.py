"""What all subscribers have in common: records become changes, and changes a table."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Generic, Protocol, Self, TypeVar

from streams.errors import StreamformerError
from streams.subscriber.reader import TopicReader
from streams.wire.headers import Tombstone

logger = logging.getLogger(__name__)


class HasUser(Protocol):
    """What a subscriber holds per user."""

    @property
    def user(self) -> str:
        """User id."""


Item = TypeVar("Item", bound=HasUser)
Decoded = TypeVar("Decoded")


class Subscriber(ABC, Generic[Item]):
    """Base of all subscribers; not safe to share between threads."""

    _reader: TopicReader

    def __init__(self) -> None:
        self.malformed = 0
        """Number of records skipped because they cannot be decoded."""

    @abstractmethod
    def _changes(self, records: Iterable[Any]) -> Iterator[Item | Tombstone]:
        """Yield what is new in records."""

    def __iter__(self) -> Iterator[Item | Tombstone]:
        """Yield every change as it arrives, without end; wait while the broker is away."""
        while True:
            yield from self.poll(1_000)

    def poll(self, timeout_ms: int, records_max: int = 500) -> list[Item | Tombstone]:
        """Return the changes in at most `records_max` records; an empty list if none arrives in `timeout_ms`.

        Raises `DamagedTopic` at a record batch whose checksum or content is damaged; no call can pass it.
        """
        return list(self._changes(self._reader.poll(timeout_ms, records_max)))

    def table(self) -> dict[str, Item]:
        """Read up to the present end of the topic; return the newest item of each user not forgotten."""
        held: dict[str, Item] = {}
        for records in self._reader.until_end():
            for change in self._changes(records):
                if isinstance(change, Tombstone):
                    held.pop(change.user, None)
                else:
                    held[change.user] = change
        return held

    def close(self) -> None:
        """Close the connection."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _skip(self, record: Any, error: StreamformerError) -> None:
        """Count a record that cannot be decoded."""
        self.malformed += 1
        logger.warning("skipped offset %d of partition %d: %s", record.offset, record.partition, error)
