"""Freshness is matched with the right event, and a stranger on the topics is noticed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from infra.datasets.replay import Acknowledged
from infra.demo.live import Meter
from infra.demo.observer import ForeignEvents, Observer, Seen, Sent
from streams.config.settings import Settings
from streams.wire.embeddings import EmbeddingBatch, EmbeddingCodec, encode_embeddings, encode_tombstone

USERS = [b"ann", b"bob"]


def _sent() -> Sent:
    sent = Sent(2)
    sent.add(Acknowledged(0, 0, np.array([0, 1]), 1_000))
    sent.add(Acknowledged(0, 2, np.array([3]), 1_010))
    sent.add(Acknowledged(1, 0, np.array([2]), 1_005))
    return sent


def _record(user: bytes, source_offset: int, reason: str = "every-n") -> SimpleNamespace:
    batch = EmbeddingBatch(
        [user], np.ones((1, 2), np.float32), np.array([50]), np.array([1]), [reason], np.array([source_offset]), "v", 9
    )
    key, value, headers = next(encode_embeddings(batch, EmbeddingCodec.FLOAT32))
    return SimpleNamespace(key=key, value=value, headers=headers)


def test_freshness_is_received_minus_sent_of_the_newest_event_inside() -> None:
    """Partition and source offset name the event; one not acknowledged yet has no freshness."""
    columns = ([0, 1, 0, 1], [0, 1, 0, 1], [1, 0, 2, 9], [0, 0, 0, 0], [1_030, 1_030, 1_030, 1_030])
    seen = Seen(*(np.array(column) for column in columns))
    assert seen.freshness_ms(_sent()).tolist() == [30, 25, 20, -1]


def test_events_of_somebody_else_end_the_demo() -> None:
    """An acknowledged offset that is not the next one means that others write to the topic: counts would be wrong."""
    with pytest.raises(ForeignEvents, match="offset 5 of partition 0 where 3 was next"):
        _sent().add(Acknowledged(0, 5, np.array([4]), 1_020))


def test_the_observer_keeps_order_and_the_last_vector_of_each_user() -> None:
    """Embeddings are kept in order of arrival; a tombstone is no embedding."""
    observer = Observer(Settings(), USERS)
    observer._take(0, [_record(b"ann", 0), _record(b"ann", 1, "strong")], 1_030)
    tombstone = encode_tombstone(b"bob", 3)
    observer._take(1, [SimpleNamespace(key=tombstone[0], value=tombstone[1], headers=tombstone[2])], 1_031)
    assert len(observer) == 2
    assert observer.newest_offset.tolist() == [1, -1]
    assert observer.seen().source_offset.tolist() == [0, 1]
    assert set(observer.last_vectors()) == {0}
    assert observer.reasons == {"every-n": 1, "strong": 1}


def test_lag_counts_events_behind_the_newest_embedded_one() -> None:
    """Three events of partition 0 and one of partition 1 are out; an embedding of offset 1 leaves two to go."""
    settings = Settings()
    two = settings.model_copy(update={"topics": settings.topics.model_copy(update={"partitions": 2})})
    observer = Observer(two, USERS)
    assert observer.lag(_sent()) == 4
    observer._take(0, [_record(b"ann", 1)], 1_030)
    assert observer.lag(_sent()) == 2


def test_the_meter_counts_from_its_creation() -> None:
    """Figures of a replay leave out what the backfill sent and caused."""
    settings = Settings()
    two = settings.model_copy(update={"topics": settings.topics.model_copy(update={"partitions": 2})})
    observer, sent = Observer(two, USERS), _sent()
    observer._take(0, [_record(b"ann", 1)], 1_030)
    meter = Meter(sent, observer, 1)
    sent.add(Acknowledged(1, 1, np.array([5]), 1_100))
    observer._take(1, [_record(b"bob", 1)], 1_140)
    figures = meter.read()
    assert (figures.events, figures.embeddings, figures.reasons) == (1, 1, {"every-n": 1})
    assert figures.freshness_p50_ms == 40
