"""Decides which changes are new, by the source offsets seen before them, in bounded memory."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import OrderedDict
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

from streams.wire.embeddings import Embedding
from streams.wire.features import NEVER_MS, UserFeatures
from streams.wire.headers import Tombstone

Change = Embedding | Tombstone
FeatureChange = UserFeatures | Tombstone
AnyChange = TypeVar("AnyChange", Change, FeatureChange)


class Verdict(Enum):
    """What a change is, compared with those seen before."""

    NEW = "new"
    STALE = "stale"
    REPEATED = "repeated"


class Judge(ABC, Generic[AnyChange]):
    """Base of both: counts what is not new."""

    def __init__(self) -> None:
        self.stale = self.repeated = 0

    @abstractmethod
    def judge(self, change: AnyChange) -> Verdict:
        """Return what `change` is, and remember it if it is new."""

    def accepts(self, change: AnyChange) -> bool:
        """Return whether `change` is new, and remember it if so; count it if not."""
        verdict = self.judge(change)
        self.stale += verdict is Verdict.STALE
        self.repeated += verdict is Verdict.REPEATED
        return verdict is Verdict.NEW


class Freshest(Judge[Change]):
    """Decides whether a change of an embedding is new.

    An embedding is new unless the same or a later offset was seen in an embedding of the same user and encoder version
    or in the user's tombstone. A tombstone is new unless the same or a later offset was seen in any change of the user.
    Offsets of different source logs cannot be compared: the first change of a user from another log is new, unless the
    log is an earlier life of the one seen last. Beyond `users_max` users, the user without a change for longest is
    forgotten, and its next change is new.
    """

    def __init__(self, users_max: int) -> None:
        super().__init__()
        self._users_max = users_max
        self._offsets: OrderedDict[str, dict[str | None, int]] = OrderedDict()
        """User -> encoder version (None for the tombstone) -> newest source offset."""
        self._sources: dict[str, str] = {}
        """User -> id of the source log of its last change, where known."""

    def judge(self, change: Change) -> Verdict:
        """Return what `change` is, and remember it if it is new."""
        offsets = self._offsets.setdefault(change.user, {})
        self._offsets.move_to_end(change.user)
        if len(self._offsets) > self._users_max:
            self._sources.pop(self._offsets.popitem(last=False)[0], None)
        source_id = source_id_of(change)
        if source_id:
            seen = self._sources.get(change.user, "")
            if is_earlier_life(source_id, seen):
                return Verdict.STALE
            if is_other_log(source_id, seen):
                offsets.clear()
            self._sources[change.user] = sys.intern(source_id)
        if isinstance(change, Tombstone):
            return self._judge(offsets, None, change.source_offset, max(offsets.values(), default=-1))
        version, offset = change.metadata.encoder_version, change.metadata.source_offset
        return self._judge(offsets, version, offset, max(offsets.get(version, -1), offsets.get(None, -1)))

    def _judge(self, offsets: dict[str | None, int], of: str | None, offset: int, seen: int) -> Verdict:
        if 0 <= offset <= seen:
            return Verdict.STALE if offset < seen else Verdict.REPEATED
        offsets[of] = max(offset, offsets.get(of, -1))
        return Verdict.NEW


class _Seen(NamedTuple):
    """The newest change of a user."""

    offset: int
    as_of_ms: int
    """`NEVER_MS` for a tombstone, which is later than any features of its offset."""
    feature_set: str
    source_id: str


class FreshestFeatures(Judge[FeatureChange]):
    """Decides whether a change of features is new.

    Features are new unless a later source offset was seen, or the same with the same or a later as-of time: features of
    one offset are published again as time passes. Those of another feature set are new at the same offset and time too.
    A tombstone is new unless the same or a later offset was seen in a tombstone, or a later one in features. Source
    logs and `users_max` are as in `Freshest`.
    """

    def __init__(self, users_max: int) -> None:
        super().__init__()
        self._users_max = users_max
        self._seen: OrderedDict[str, _Seen] = OrderedDict()

    def judge(self, change: FeatureChange) -> Verdict:
        """Return what `change` is, and remember it if it is new."""
        now, seen = _position(change), self._seen.get(change.user)
        if seen is not None:
            self._seen.move_to_end(change.user)
            if now.source_id and is_earlier_life(now.source_id, seen.source_id):
                return Verdict.STALE
            if not (now.source_id and is_other_log(now.source_id, seen.source_id)):
                if now[:2] < seen[:2] and now.offset >= 0:
                    return Verdict.STALE
                if now[:3] == seen[:3] and now.offset >= 0:
                    return Verdict.REPEATED
                now = now._replace(source_id=now.source_id or seen.source_id)
                if now.offset < 0:  # the offset is not stated: what was seen before still outdates older features
                    now = seen._replace(source_id=now.source_id)
        self._seen[change.user] = now
        if len(self._seen) > self._users_max:
            self._seen.popitem(last=False)
        return Verdict.NEW


def source_id_of(change: Change | FeatureChange) -> str:
    """Return the id of the log that the change's source offset belongs to, empty if unknown."""
    return change.source_id if isinstance(change, Tombstone) else change.metadata.source_id


def source_offset_of(change: Change | FeatureChange) -> int:
    """Return the change's source offset, -1 if a tombstone does not state it."""
    return change.source_offset if isinstance(change, Tombstone) else change.metadata.source_offset


def is_earlier_life(source_id: str, seen: str) -> bool:
    """Return whether `source_id` is the same log as `seen`, before its position was moved back."""
    (topic_id, _, life), (seen_topic_id, _, seen_life) = source_id.partition("/"), seen.partition("/")
    return topic_id == seen_topic_id and _number(life) < _number(seen_life)


def is_other_log(source_id: str, seen: str) -> bool:
    """Return whether offsets of the two cannot be compared.

    A first id without a life may be that of the offsets seen so far, so it can be compared with none.
    """
    return source_id != seen and bool(seen or "/" in source_id)


def _position(change: FeatureChange) -> _Seen:
    if isinstance(change, Tombstone):
        return _Seen(change.source_offset, NEVER_MS, "", sys.intern(change.source_id))
    metadata = change.metadata
    return _Seen(
        metadata.source_offset, metadata.as_of_ms, sys.intern(metadata.feature_set), sys.intern(metadata.source_id)
    )


def _number(life: str) -> int:
    return int(life) if life.isascii() and life.isdigit() else 0
