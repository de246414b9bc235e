"""Embedding and features of a user as of one source offset."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.subscriber import Embedding, Joined, JoinedSubscriber, Tombstone, UserFeatures
from streams.subscriber.joined import JoinedView
from streams.wire.embeddings import EmbeddingBatch, EmbeddingCodec, encode_embeddings
from streams.wire.features import FeatureBatch, encode_features
from streams.wire.headers import Message, encode_tombstone
from tests.unit.subscriber.test_embeddings import embedding
from tests.unit.subscriber.test_features import features

EMBEDDINGS, FEATURES = "user-embeddings", "user-features"


def steps(view: JoinedView, text: str) -> list[tuple[int, int] | None]:
    """Add records of one user; return after each the offset and the as-of time of its pair.

    `e5` is an embedding at offset 5, `f5.20` are features at offset 5 as of time 20, `te7` and `tf7` are tombstones at
    7 of the topics of embeddings and of features.
    """
    found = []
    for word in text.split():
        kind, offset, as_of = re.fullmatch(r"(e|f|te|tf)(-?\d+)(?:\.(\d+))?", word).groups()  # type: ignore[union-attr]
        if kind in ("te", "tf"):
            view.forget(Tombstone("ann", int(offset)), by_embeddings=kind == "te")
        else:
            view.add(embedding("ann", int(offset)) if kind == "e" else features("ann", int(offset), int(as_of or 0)))
        pair = view.get("ann")
        found.append(pair and (pair.source_offset, pair.features.metadata.as_of_ms))
    return found


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("f5 e5", [None, (5, 0)]),
        ("e5 f5", [None, (5, 0)]),
        ("f5 e5 f6 e6", [None, (5, 0), (5, 0), (6, 0)]),  # the old pair stays until the new one is complete
        ("f5 f6 e5 e6", [None, None, (5, 0), (6, 0)]),  # features may be ahead by two
        ("f5 f6 f7 e5 e6 e7", [None, None, None, None, (6, 0), (7, 0)]),  # and by three the first is not complete
        ("e5 e6 f5 f6", [None, None, None, (6, 0)]),
        ("f5 f5.9 e5", [None, None, (5, 9)]),  # a refresh before the embedding
        ("f5 f6 f6.9 e5 e6", [None, None, None, (5, 0), (6, 9)]),  # a refresh is not a third record
        ("f5 e5 f5.9", [None, (5, 0), (5, 9)]),  # a refresh of the pair
        ("f5.9 e5 f5.8", [None, (5, 9), (5, 9)]),  # an outdated one
        ("f5 e5 f4 e4", [None, (5, 0), (5, 0), (5, 0)]),
        ("f5 e5 f8.9 e9 f9", [None, (5, 0), (5, 0), (5, 0), (9, 0)]),  # refreshed with an event not yet embedded
        ("f5 e5 te7 tf7", [None, (5, 0), None, None]),
        ("f5 e5 tf7 te7", [None, (5, 0), None, None]),
        ("f5 e5 tf7 f8 te7 e8", [None, (5, 0), None, None, None, (8, 0)]),  # the second copy forgets nothing
        ("f5 e5 f8 te7 tf7 e8", [None, (5, 0), (5, 0), None, None, (8, 0)]),  # later features outlive it
        ("f5 tf7 e5 te7", [None, None, None, None]),  # an embedding of before the tombstone is not held
        ("f5 e5 te-1 f6 e6", [None, (5, 0), None, None, (6, 0)]),
        ("f5 te-1 e6 f6", [None, None, None, (6, 0)]),
        ("f5 te-1 e5", [None, None, (5, 0)]),  # a tombstone that states no offset is only that of its topic
        ("e5 tf-1 f5", [None, None, (5, 0)]),
        ("f5 e5 tf-1", [None, (5, 0), None]),
    ],
)
def test_pairs_have_one_offset(text: str, pairs: list[tuple[int, int] | None]) -> None:
    """A pair is complete once both halves of one offset have arrived, in whatever order."""
    assert steps(JoinedView(10), text) == pairs


def test_nothing_of_before_a_tombstone_is_held() -> None:
    """A tombstone between two records of features removes the older one from memory."""
    view = JoinedView(10)
    steps(view, "f5 f8 te7")
    assert [each.metadata.source_offset for each in view._users["ann"].features] == [8]
    steps(view, "te9")
    assert not view._users


def test_halves_of_different_logs_are_no_pair() -> None:
    """Equal offsets of two source logs are not the same event."""
    view = JoinedView(10)
    assert view.add(features("ann", 5, source_id="A")) is None
    assert view.add(embedding("ann", 5, source_id="B")) is None
    assert view.get("ann") is None
    pair = view.add(features("ann", 5, source_id="B"))
    assert pair is not None
    assert pair.features.metadata.source_id == "B"


def test_another_encoder_version_pairs_with_the_features_that_are_there() -> None:
    """After a new release the same offset is embedded again; an older offset of either version is stale."""
    view = JoinedView(10)
    for change in (features("ann", 5), embedding("ann", 5), embedding("ann", 5, "v2"), embedding("ann", 4, "v3")):
        view.add(change)
    pair = view.get("ann")
    assert pair is not None
    assert (pair.embedding.metadata.encoder_version, pair.source_offset, view.stale) == ("v2", 5, 1)


def test_memory_is_bounded_by_users() -> None:
    """The user without a change for longest makes room, counted, and is complete again after its next change."""
    view = JoinedView(2)
    for user in ("ann", "bob", "cem"):
        view.add(features(user, 5))
        view.add(embedding(user, 5))
    assert set(view.pairs()) == {"bob", "cem"}
    assert (view.evicted, view.get("ann"), view.unmatched) == (1, None, 0)
    view.add(features("ann", 6))
    assert view.unmatched == 1
    view.add(embedding("ann", 6))
    assert set(view.pairs()) == {"cem", "ann"}


@dataclass(frozen=True)
class Published:
    """What a worker published for one user in one step: features, then perhaps their embedding, or tombstones."""

    kind: str
    """`job`, `refresh`, `forget`."""
    is_repeated: bool


STEP = st.builds(Published, st.sampled_from(["job", "job", "refresh", "forget"]), st.booleans())


@settings(max_examples=300)
@given(st.lists(STEP, max_size=12), st.lists(st.booleans(), max_size=60))
def test_every_reading_order_ends_with_the_newest_pair(published: list[Published], order: list[bool]) -> None:
    """However the two topics interleave, pairs never go back, and the last one is the newest of both topics."""
    logs: tuple[list[Any], list[Any]] = ([], [])
    offset, as_of_ms, newest = 0, 0, None
    for step in published:
        as_of_ms += 1
        if step.kind == "refresh" and newest is None:
            continue
        offset += step.kind != "refresh"
        change = Tombstone("ann", offset) if step.kind == "forget" else features("ann", offset, as_of_ms)
        newest = None if step.kind == "forget" else (offset, as_of_ms)
        logs[1].extend([change] * (1 + step.is_repeated))
        if step.kind != "refresh":
            other = change if step.kind == "forget" else embedding("ann", offset)
            logs[0].extend([other] * (1 + step.is_repeated))
    view, last, tombstones = JoinedView(10), (-1, -1), 0
    places = [0, 0]
    for choice in [*order, *[True] * len(logs[0]), *[False] * len(logs[1])]:
        of = 0 if choice else 1
        if places[of] == len(logs[of]):
            continue
        change = logs[of][places[of]]
        places[of] += 1
        if isinstance(change, Tombstone):
            tombstones += view.forget(change, by_embeddings=of == 0)
            continue
        pair = view.add(change)
        if pair is not None:
            position = (pair.source_offset, pair.features.metadata.as_of_ms)
            assert pair.features.metadata.source_offset == pair.embedding.metadata.source_offset
            assert position > last
            last = position
    final = view.get("ann")
    assert (final and (final.source_offset, final.features.metadata.as_of_ms)) == newest
    assert tombstones <= sum(step.kind == "forget" for step in published)


class FakeReader:
    """Topics in memory: each poll returns the next list of records."""

    def __init__(self, polls: Sequence[Sequence[Any]]) -> None:
        self._polls = list(polls)
        self.closed = False

    def poll(self, timeout_ms: int, records_max: int) -> Sequence[Any]:
        """Return the next records."""
        return self._polls.pop(0)

    def until_end(self) -> Sequence[Sequence[Any]]:
        """Return all of them."""
        return self._polls

    def close(self) -> None:
        """Note that it was closed."""
        self.closed = True


@dataclass
class Consumed:
    """A record as kafka-python returns it."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    offset: int = 0
    partition: int = 0

    @classmethod
    def of(cls, topic: str, message: Message) -> Consumed:
        """Return the record of a message."""
        return cls(topic, *message)


def records(offset: int) -> list[Consumed]:
    """Return the records of ann's job: features, then the embedding."""
    one = np.array([offset])
    values = FeatureBatch([b"ann"], [b'{"n":1}'], one, one, one, one + 9, ["every_n"], [{}], [()], "set1", 7)
    vectors = EmbeddingBatch([b"ann"], np.ones((1, 2), np.float32), one, one, ["every_n"], one, "v1", 7)
    return [
        *(Consumed.of(FEATURES, message) for message in encode_features(values)),
        *(Consumed.of(EMBEDDINGS, message) for message in encode_embeddings(vectors, EmbeddingCodec.FLOAT32)),
    ]


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> FakeReader:
    """Return a reader of no records yet, which the subscribers of a test use."""
    fake = FakeReader([])
    monkeypatch.setattr("streams.subscriber.joined.TopicReader", lambda *_, **__: fake)
    return fake


def test_changes_are_pairs_and_tombstones(reader: FakeReader) -> None:
    """Half a pair is no change; damaged records are counted; a user's tombstones in both topics are one change."""
    five, six = records(5), records(6)
    damaged = [Consumed(EMBEDDINGS, b"ann", b"x", []), Consumed(FEATURES, b"ann", b"{", [])]
    forgotten = [Consumed.of(topic, encode_tombstone(b"ann", 8)) for topic in (FEATURES, EMBEDDINGS)]
    reader._polls = [five[:1], [*damaged, *five[1:]], [*six, *five, *six], forgotten]
    with JoinedSubscriber("127.0.0.1:1") as subscriber:
        assert subscriber.poll(1) == []
        assert subscriber.unmatched == 1
        (first,) = subscriber.poll(1)
        assert isinstance(first, Joined)
        assert (first.user, first.source_offset) == ("ann", 5)
        assert isinstance(first.embedding, Embedding)
        assert isinstance(first.features, UserFeatures)
        (second,) = subscriber.poll(1)
        assert second is subscriber.get("ann")
        assert subscriber.poll(1) == [Tombstone("ann", 8)]
        assert subscriber.get("ann") is None
        assert (subscriber.malformed, subscriber.stale, subscriber.repeated, subscriber.evicted) == (2, 2, 2, 0)
    assert reader.closed


def test_a_table_is_every_users_pair(reader: FakeReader) -> None:
    """The table holds the newest pair of each user, also of those that changed before it was read."""
    reader._polls = [records(5), records(6)[:1]]
    subscriber = JoinedSubscriber("127.0.0.1:1")
    subscriber.poll(1)
    assert {user: pair.source_offset for user, pair in subscriber.table().items()} == {"ann": 5}
    assert subscriber.unmatched == 1
