"""Embedding and features of a user as of one source offset, from two topics that are read at different speeds.

The worker publishes the features of a job before its embedding, and both name the same source offset. A reader sees the
two topics in no common order, so what arrives first is held until its other half arrives:

    features topic      10 . . 20 . . 30
    embeddings topic       10 . . . .
                           ^ 20 and 30 are held, (10, 10) is the pair that `get` returns

Per user, memory holds the newest pair, the newest embedding if it is later than the pair, and the newest two records of
features later than the pair. If three or more are read before the embedding of the first, the pairs in between are
never complete, but a later one is: the newest embedding and features of a user always end up at one offset.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from streams.subscriber.base import Subscriber
from streams.subscriber.freshest import Freshest, FreshestFeatures, Verdict
from streams.subscriber.reader import TopicReader
from streams.wire.embeddings import Embedding, MalformedEmbedding, decode_embedding
from streams.wire.features import MalformedFeatures, UserFeatures, decode_features
from streams.wire.headers import Tombstone

Half = Embedding | UserFeatures
FEATURES_HELD = 2
"""Records of features that are held of a user until its embedding arrives."""


@dataclass(frozen=True, slots=True)
class Joined:
    """The embedding and the features of a user, of the same source offset in the same log."""

    embedding: Embedding
    features: UserFeatures

    @property
    def user(self) -> str:
        """User id."""
        return self.embedding.user

    @property
    def source_offset(self) -> int:
        """Source offset of the newest event inside both."""
        return self.embedding.metadata.source_offset


JoinedChange = Joined | Tombstone


@dataclass(slots=True)
class _Halves:
    """What is held of a user."""

    pair: Joined | None = None
    embedding: Embedding | None = None
    """Newest embedding, if its features have not arrived."""
    features: list[UserFeatures] = field(default_factory=list)
    """Features whose embedding has not arrived, oldest first."""


class JoinedView:
    """Joins changes of embeddings and features, of at most `users_max` users; no input or output."""

    def __init__(self, users_max: int) -> None:
        self._users_max = users_max
        self._users: OrderedDict[str, _Halves] = OrderedDict()
        self._embeddings, self._features = Freshest(users_max), FreshestFeatures(users_max)
        self.stale = self.repeated = self.evicted = 0

    def get(self, user: str) -> Joined | None:
        """Return the newest pair of a user."""
        halves = self._users.get(user)
        return halves.pair if halves else None

    def pairs(self) -> dict[str, Joined]:
        """Return the newest pair of every user that has one."""
        return {user: halves.pair for user, halves in self._users.items() if halves.pair}

    @property
    def unmatched(self) -> int:
        """Number of users with an embedding or features later than their pair."""
        return sum(1 for each in self._users.values() if each.embedding or each.features)

    def add(self, half: Half) -> Joined | None:
        """Take an embedding or features; return the pair if this completes or refreshes one."""
        return self._add_features(half) if isinstance(half, UserFeatures) else self._add_embedding(half)

    def forget(self, tombstone: Tombstone, *, by_embeddings: bool) -> bool:
        """Take a tombstone from either topic; return whether it is new.

        Each topic has its own copy of a tombstone. The first forgets both halves as far as they are older, and the
        second is not new. A tombstone that states no offset forgets only the half of its own topic.
        """
        is_stated = tombstone.source_offset >= 0
        older_embedding = (is_stated or by_embeddings) and self._embeddings.judge(tombstone) is Verdict.NEW
        older_features = (is_stated or not by_embeddings) and self._features.judge(tombstone) is Verdict.NEW
        halves = self._users.get(tombstone.user)
        if halves is not None:
            halves.features = [each for each in halves.features if not (older_features or _outdates(tombstone, each))]
            if older_embedding:
                halves.embedding = None
            if older_embedding or older_features:
                halves.pair = None
            if not (halves.embedding or halves.features or halves.pair):
                del self._users[tombstone.user]
        return older_embedding or older_features

    def _add_embedding(self, embedding: Embedding) -> Joined | None:
        if not self._is_new(self._embeddings.judge(embedding)):
            return None
        halves = self._halves_of(embedding.user)
        held = [halves.embedding, halves.pair and halves.pair.embedding]
        if any(each and _same_log(each, embedding) and _offset(embedding) < _offset(each) for each in held):
            self.stale += 1  # new among those of its encoder version, but not among all
            return None
        halves.embedding = embedding
        for place, features in enumerate(halves.features):
            if _match(embedding, features):
                return self._complete(halves, Joined(embedding, features), halves.features[place + 1 :])
        if halves.pair and _match(embedding, halves.pair.features):
            return self._complete(halves, Joined(embedding, halves.pair.features), halves.features)
        return None

    def _add_features(self, features: UserFeatures) -> Joined | None:
        if not self._is_new(self._features.judge(features)):
            return None
        halves = self._halves_of(features.user)
        if halves.embedding and _match(halves.embedding, features):
            return self._complete(halves, Joined(halves.embedding, features), [])
        if halves.pair and _match(halves.pair.embedding, features):
            halves.pair = Joined(halves.pair.embedding, features)
            return halves.pair
        earlier = [each for each in halves.features if not _match(features, each)]
        halves.features = [*earlier, features][-FEATURES_HELD:]
        return None

    def _is_new(self, verdict: Verdict) -> bool:
        self.stale += verdict is Verdict.STALE
        self.repeated += verdict is Verdict.REPEATED
        return verdict is Verdict.NEW

    def _halves_of(self, user: str) -> _Halves:
        """Return what is held of `user`; the user without a change for longest makes room."""
        halves = self._users.setdefault(user, _Halves())
        self._users.move_to_end(user)
        if len(self._users) > self._users_max:
            self._users.popitem(last=False)
            self.evicted += 1
        return halves

    @staticmethod
    def _complete(halves: _Halves, pair: Joined, later: list[UserFeatures]) -> Joined:
        halves.pair, halves.embedding, halves.features = pair, None, later
        return pair


class JoinedSubscriber(Subscriber[Joined]):
    """Reads the topics of embeddings and of features; not safe to share between threads.

    Each change is a new pair of a user (`Joined`), or the tombstone of a user, once. Both halves of a pair have the
    same source offset in the same log. Features that are published again for that offset, because time has passed,
    replace those of the pair.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        *,
        topics: tuple[str, str] = ("user-embeddings", "user-features"),
        from_beginning: bool = False,
        partitions: Collection[int] | None = None,
        users_max: int = 1_000_000,
        client: Mapping[str, Any] | None = None,
    ) -> None:
        """Connect, at the end of the topics or at their beginning.

        Args:
            bootstrap_servers: Addresses of brokers, `host:port`, separated by commas.
            topics: Topic of the embeddings and topic of the features.
            from_beginning: Whether to read what the topics already hold.
            partitions: Partitions to read of both topics, so that readers can share the users; None reads all.
            users_max: Number of users that are held, each with up to two embeddings and three records of features; the
                one without a change for longest makes room and is counted in `evicted`.
            client: Further options of kafka-python, for instance for security.

        Raises:
            BrokerUnreachable: No broker responds.
            CannotStart: A topic or one of the partitions does not exist.
        """
        super().__init__()
        self._embeddings_topic, _ = topics
        self._view = JoinedView(users_max)
        self._reader = TopicReader(
            bootstrap_servers, topics, from_beginning=from_beginning, partitions=partitions, client=client
        )

    def get(self, user: str) -> Joined | None:
        """Return the newest pair of `user` among the records that were read; None if there is none.

        It reads nothing: call `poll`, or iterate, to get on.
        """
        return self._view.get(user)

    def table(self) -> dict[str, Joined]:
        """Read up to the present end of both topics; return the newest pair of each user that has one."""
        for records in self._reader.until_end():
            for _ in self._changes(records):
                pass
        return self._view.pairs()

    @property
    def unmatched(self) -> int:
        """Number of users whose newest embedding or features still lack their other half."""
        return self._view.unmatched

    @property
    def evicted(self) -> int:
        """Number of users that made room for others, of which `get` returns nothing until they change."""
        return self._view.evicted

    @property
    def stale(self) -> int:
        """Number of embeddings and features dropped because newer ones of the same user had been seen."""
        return self._view.stale

    @property
    def repeated(self) -> int:
        """Number of embeddings and features dropped because they had been seen."""
        return self._view.repeated

    def _changes(self, records: Iterable[Any]) -> Iterator[JoinedChange]:
        for record in records:
            is_embedding = record.topic == self._embeddings_topic
            decode = decode_embedding if is_embedding else decode_features
            try:
                change = decode(record.key, record.value, record.headers)
            except (MalformedEmbedding, MalformedFeatures) as error:
                self._skip(record, error)
                continue
            if isinstance(change, Tombstone):
                if self._view.forget(change, by_embeddings=is_embedding):
                    yield change
            elif pair := self._view.add(change):
                yield pair


def _offset(half: Half) -> int:
    return half.metadata.source_offset


def _same_log(one: Half, other: Half) -> bool:
    return one.metadata.source_id == other.metadata.source_id


def _match(one: Half, other: Half) -> bool:
    """Return whether both are as of the same source offset in the same log."""
    return _offset(one) == _offset(other) and _same_log(one, other)


def _outdates(tombstone: Tombstone, half: Half) -> bool:
    return half.metadata.source_id == tombstone.source_id and _offset(half) <= tombstone.source_offset
