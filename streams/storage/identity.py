"""The log that a state belongs to. A mark and a local store carry it, so that no other log is read into them.

Offsets mean something only within one incarnation of one topic in one cluster. A topic that was deleted and created
again under its name has another topic id (KIP-516), and a mirror is in another cluster. State whose identity differs
from what the settings lead to is rejected with the ways on, and never reinterpreted.

An unclean leader election keeps the id and cuts the log. Once the log has grown again, its offsets cover those of the
state, and only its records differ. A mark therefore also holds the last record that it contains (`LastRecord`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, Self
from zlib import crc32

from streams.core.layout import StateLimits


@dataclass(frozen=True, slots=True)
class Identity:
    """What the state of an application is derived from, and how it is laid out; an empty id is unknown."""

    cluster_id: str
    """Id of the Kafka cluster."""
    source_topic: str
    """Name of the topic whose offsets the state holds."""
    source_topic_id: str
    """Id of that topic; another one after the topic was deleted and created again."""
    changelog_topic_id: str
    """Id of the changelog topic."""
    layout: str
    """Sizes of the sequences, by `layout_of`."""
    feature_set: str = ""
    """Version of the features beside the sequences; empty without any."""

    @property
    def log_id(self) -> str:
        """Text that a local store keeps to recognise its changelog; empty if the broker reports no ids."""
        return f"{self.cluster_id}/{self.changelog_topic_id}" if self.changelog_topic_id else ""

    def as_json(self) -> dict[str, str]:
        """Return the fields for the mark's JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Identity:
        """Return the identity in a mark; fields added by a later release are ignored, missing ones are unknown."""
        return cls(**{each.name: str(values.get(each.name, "")) for each in fields(cls)})


class Record(Protocol):
    """A consumed record, as far as it is compared."""

    @property
    def offset(self) -> int:
        """Offset in the source partition."""

    @property
    def timestamp(self) -> int:
        """Record time in ms."""

    @property
    def key(self) -> bytes | None:
        """Key as received."""

    @property
    def value(self) -> bytes | None:
        """Value as received."""


@dataclass(frozen=True, slots=True)
class LastRecord:
    """The last visible record of the source partition that a state contains."""

    offset: int
    checksum: int
    """CRC-32 over time, key and value."""

    @classmethod
    def of(cls, record: Record) -> Self:
        """Return offset and checksum of a record."""
        checksum = crc32(b"%d" % record.timestamp)
        for part in (record.key, record.value):
            length = -1 if part is None else len(part)
            checksum = crc32(part or b"", crc32(b" %d " % length, checksum))
        return cls(record.offset, checksum)

    def as_json(self) -> list[int]:
        """Return the fields for the mark's JSON."""
        return [self.offset, self.checksum]

    @classmethod
    def from_json(cls, values: Any) -> Self | None:
        """Return the record in a mark; None in a mark of a release that kept none. Raises TypeError or ValueError."""
        if values is None:
            return None
        offset, checksum = values
        return cls(int(offset), int(checksum))


def layout_of(limits: StateLimits) -> str:
    """Return the text that identifies the sizes of the stored sequences."""
    return f"{limits.sequence_length} actions in chunks of {limits.chunk_length}"


def differences(held: Identity, found: Identity) -> Iterator[str]:
    """Yield one phrase per field in which the identity of a state differs from what the settings lead to.

    An id that one side does not know (a broker before 2.8 reports none) cannot differ. The feature set is compared
    even if it is empty, because empty means that there is none.
    """
    labels = {
        "cluster_id": "cluster",
        "source_topic": "source topic",
        "source_topic_id": f"id of the topic {found.source_topic}",
        "changelog_topic_id": "id of the changelog topic",
        "layout": "layout",
        "feature_set": "feature set",
    }
    for field, label in labels.items():
        of_state, now = getattr(held, field), getattr(found, field)
        if of_state != now and (field == "feature_set" or (of_state and now)):
            yield f"{label} {now or 'none'} instead of {of_state or 'none'}"
