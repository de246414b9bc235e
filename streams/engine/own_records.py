"""Records of an output topic as a new owner of the partition reads them: which are of its encoder and feature set.

A job publishes the features of a user first, and its embedding when they are acknowledged. So a user whose features of
some source offset are in their topic has at least these, and perhaps not the embedding of that offset. What is noted of
a record is the source offset that *every* topic of the worker holds for certain:

    worker computes     embedding of offset x    features of offset x    tombstone of offset x
    embeddings only     x                        -                       x
    features only       -                        x                       x
    both                x                        x - 1                   x if it is in both topics, else x - 1

A user is then published again at offset x at most, never at an older one, and no topic lacks what the other one has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from encoder.arrays import I64
from streams.wire.embeddings import MalformedEmbedding, decode_metadata
from streams.wire.features import MalformedFeatures, decode_feature_metadata

TOMBSTONES_MAX = 100_000
"""Tombstones that are remembered from one topic to the next; others are published again."""


@dataclass(frozen=True, slots=True)
class Published:
    """A page of what one encoder version, or feature set, has published in one partition of an output topic."""

    users: list[bytes]
    source_offsets: I64
    """[U] newest source offset of each user that is published for certain."""
    end: int
    """Offset in the output topic after the page."""
    foreign: int = 0
    """Records left out because their source offsets belong to another log."""
    newest: int = -1
    """Newest source offset of a record of the page, -1 without one; up to one ahead of what is certain."""


@dataclass(frozen=True, slots=True)
class OwnRecords:
    """Recognises the records of an encoder version, or of a feature set, and of one source log."""

    encoder_version: str
    """Empty for a worker without an encoder."""
    feature_set: str
    """Version of the feature set; empty for a worker that computes no features."""
    source_id: str = ""
    """Identity of the source log; empty if it is unknown."""
    is_features: bool = False
    """Whether the topic is that of the features, which is read after the other one."""
    tombstones: dict[bytes, int] = field(default_factory=dict)
    """Source offset of the last tombstone of each user in the topic of embeddings, for the topic of features."""

    def page(self, records: Sequence[Any]) -> Published:
        """Return the newest source offset of each user in consecutive records of the topic."""
        certain: dict[bytes, int] = {}
        foreign, newest = 0, -1
        for record in records:
            source_offset, of, ahead = self._source(record)
            if record.key is None or source_offset is None:
                continue
            if of and self.source_id and of != self.source_id:
                foreign += 1
            else:
                certain[record.key] = max(source_offset, certain.get(record.key, -1))
                newest = max(newest, source_offset + ahead)
        offsets = np.fromiter(certain.values(), np.int64, len(certain))
        return Published(list(certain), offsets, records[-1].offset + 1, foreign, newest)

    def _source(self, record: Any) -> tuple[int | None, str, int]:
        """Return the certain source offset of a record, its source id, and how far its own offset is ahead.

        The offset is None for a record of others.
        """
        has_both = bool(self.encoder_version and self.feature_set)
        if record.value is None:
            headers = dict(record.headers)
            text = headers.get("source-offset")
            source_id = (headers.get("source-id") or b"").decode()
            if text is None:
                return None, source_id, 0
            certain = self._certain(record.key, int(text), has_both)
            return certain, source_id, int(text) - certain
        try:
            if self.is_features:
                features = decode_feature_metadata(record.headers)
                offset = features.source_offset - has_both
                is_own = features.feature_set == self.feature_set
                return offset if is_own else None, features.source_id, int(has_both)
            metadata = decode_metadata(record.headers)
        except (MalformedEmbedding, MalformedFeatures):
            return None, "", 0
        is_own = metadata.encoder_version == self.encoder_version
        return metadata.source_offset if is_own else None, metadata.source_id, 0

    def _certain(self, user: bytes, offset: int, has_both: bool) -> int:
        """Return the offset up to which a tombstone is in every topic for certain."""
        if not has_both:
            return offset
        if self.is_features:
            return offset - (self.tombstones.get(user, -1) < offset)
        if len(self.tombstones) < TOMBSTONES_MAX or user in self.tombstones:
            self.tombstones[user] = offset
        return offset - 1
