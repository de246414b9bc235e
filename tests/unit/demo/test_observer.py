"""The observer keeps what arrives, and the meter of the replay counts from its creation."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from infra.demo.live import Meter
from infra.demo.observer import Observer
from infra.harness.freshness import Sent
from infra.harness.worker_process import with_values
from streams.config.settings import Settings
from streams.wire.embeddings import EmbeddingBatch, EmbeddingCodec, encode_embeddings, encode_tombstone

ANN, BOB = 0, 1
TWO_PARTITIONS = with_values(Settings(), {"topics.partitions": 2})


def _observer() -> Observer:
    return Observer(TWO_PARTITIONS, [b"ann", b"bob"])


def _sent() -> Sent:
    sent = Sent([0, 0])
    sent.add(0, 0, [ANN, ANN, ANN], 1.000)
    sent.add(1, 0, [BOB], 1.005)
    return sent


def _record(user: bytes, source_offset: int, reason: str = "every-n") -> SimpleNamespace:
    batch = EmbeddingBatch(
        [user], np.ones((1, 2), np.float32), np.array([50]), np.array([1]), [reason], np.array([source_offset]), "v", 9
    )
    key, value, headers = next(encode_embeddings(batch, EmbeddingCodec.FLOAT32))
    return SimpleNamespace(key=key, value=value, headers=headers)


def test_the_observer_keeps_order_and_the_last_vector_of_each_user() -> None:
    """Embeddings are kept in order of arrival; a tombstone is no embedding."""
    observer = _observer()
    observer.take(0, [_record(b"ann", 0), _record(b"ann", 1, "strong")], 1.030)
    tombstone = encode_tombstone(b"bob", 3)
    observer.take(1, [SimpleNamespace(key=tombstone[0], value=tombstone[1], headers=tombstone[2])], 1.031)
    assert len(observer) == 2
    assert observer.newest_offset.tolist() == [1, -1]
    assert observer.received.columns().source_offset.tolist() == [0, 1]
    assert set(observer.last_vectors()) == {ANN}
    assert observer.reasons == {"every-n": 1, "strong": 1}


def test_lag_counts_events_sent_after_the_newest_embedded_one() -> None:
    """Three events of partition 0 and one of partition 1 were sent; an embedding of offset 1 leaves two."""
    observer = _observer()
    assert observer.lag(_sent()) == 4
    observer.take(0, [_record(b"ann", 1)], 1.030)
    assert observer.lag(_sent()) == 2


def test_the_meter_counts_from_its_creation() -> None:
    """The figures of a replay leave out events and embeddings of the backfill."""
    observer, sent = _observer(), _sent()
    observer.take(0, [_record(b"ann", 1)], 1.030)
    meter = Meter(sent, observer, 1)
    sent.add(1, 1, [BOB], 1.100)
    observer.take(1, [_record(b"bob", 1)], 1.140)
    figures = meter.read()
    assert (figures.events, figures.embeddings, figures.reasons) == (1, 1, {"every-n": 1})
    assert round(figures.freshness_p50_ms, 3) == 40
