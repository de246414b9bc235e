"""Which changes a subscriber takes for new."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka.errors import KafkaConnectionError

from streams.errors import BrokerUnreachable
from streams.subscriber import Change, EmbeddingSubscriber, Freshest
from streams.wire.embeddings import Embedding, EmbeddingCodec, EmbeddingMetadata, Tombstone


def embedding(user: str, offset: int, version: str = "v1", source_id: str = "") -> Embedding:
    """Return an embedding of a user at a source offset."""
    metadata = EmbeddingMetadata(version, 2, EmbeddingCodec.FLOAT32, 5, 3, "every_n", offset, 9, source_id)
    return Embedding(user, np.array([0.1, -2.0], np.float32), metadata)


class Refused:
    """A consumer that notes its options and reaches no broker."""

    options: dict[str, Any]

    def __init__(self, **options: Any) -> None:
        Refused.options = options
        raise KafkaConnectionError


@pytest.mark.parametrize(("client", "wait_ms"), [({}, 1_000), ({"reconnect_backoff_max_ms": 7}, 7)])
def test_a_broker_that_is_back_is_reached_within_a_second(
    client: dict[str, Any], wait_ms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts to connect are at most a second apart, not kafka-python's 30 s; a caller may choose another time."""
    monkeypatch.setattr("streams.subscriber.reader.KafkaConsumer", Refused)
    with pytest.raises(BrokerUnreachable):
        EmbeddingSubscriber("127.0.0.1:1", client=client)
    assert Refused.options["reconnect_backoff_max_ms"] == wait_ms


def accepted(*changes: Change, users_max: int = 100) -> list[bool]:
    """Return for each change whether it is new."""
    freshest = Freshest(users_max)
    return [freshest.accepts(change) for change in changes]


def test_an_older_or_equal_embedding_is_not_new() -> None:
    """After offset 5 of a user and version, 4 is stale, 5 repeated and 6 new; the first two are counted separately."""
    freshest = Freshest(100)
    news = [freshest.accepts(embedding("ann", offset)) for offset in (5, 4, 5, 6)]
    assert news == [True, False, False, True]
    assert (freshest.stale, freshest.repeated) == (1, 1)


def test_users_and_versions_are_apart() -> None:
    """Another user's or another encoder version's offset does not make an embedding old."""
    assert accepted(embedding("ann", 5), embedding("bob", 4), embedding("ann", 4, "v2")) == [True, True, True]


def test_a_tombstone_outdates_every_version() -> None:
    """After a tombstone at 7 no earlier embedding is new, of any version; a later one is."""
    changes: list[Change] = [Tombstone("ann", 7), embedding("ann", 6), embedding("ann", 6, "v2"), embedding("ann", 8)]
    assert accepted(*changes) == [True, False, False, True]


def test_an_old_tombstone_forgets_nobody() -> None:
    """A tombstone that is delivered again after a newer embedding is dropped; one without an offset is always new."""
    assert accepted(embedding("ann", 9), Tombstone("ann", 7), Tombstone("ann", -1)) == [True, False, True]


def test_offsets_of_another_log_are_not_compared() -> None:
    """After the source topic was created again, or its position moved back, lower offsets are new."""
    lives = [("A", 90), ("B", 3), ("B", 2), ("B/1", 1), ("B", 95), ("B/1", 2)]
    changes = [embedding("ann", offset, source_id=source) for source, offset in lives]
    assert accepted(*changes) == [True, True, False, True, False, True]
    assert accepted(embedding("ann", 9, source_id="A"), Tombstone("ann", 1, "B")) == [True, True]


def test_records_of_before_the_source_id_are_compared() -> None:
    """The first record that names its log is compared with those that do not, unless a position was moved back."""
    assert accepted(embedding("ann", 9), embedding("ann", 8, source_id="A")) == [True, False]
    assert accepted(embedding("ann", 9), embedding("ann", 8, source_id="A/1")) == [True, True]
    assert accepted(embedding("ann", 9, source_id="A/x"), embedding("ann", 8, source_id="A/-1")) == [True, True]


def test_memory_is_bounded_by_users() -> None:
    """Beyond the limit the user without a change for longest is forgotten, and only that one."""
    changes = [embedding(user, 5) for user in ("ann", "bob", "ann", "cem", "ann", "bob")]
    assert accepted(*changes, users_max=2) == [True, True, False, True, False, True]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["v1", "v2", None]), st.integers(0, 9))))
def test_accepted_offsets_only_rise(inputs: list[tuple[str, str | None, int]]) -> None:
    """Accepted offsets rise per user and version in any order of arrival, and tombstones hold for all versions."""
    freshest = Freshest(100)
    seen: dict[tuple[str, str | None], int] = {}
    for user, version, offset in inputs:
        change = Tombstone(user, offset) if version is None else embedding(user, offset, version)
        relevant = [of for of in seen if of[0] == user and (version is None or of[1] in (version, None))]
        is_news = all(seen[of] < offset for of in relevant)
        assert freshest.accepts(change) == is_news
        if is_news:
            seen[user, version] = offset
