"""The freshness meter matches embeddings with the right events and notices a second producer."""

from __future__ import annotations

import numpy as np
import pytest

from infra.harness.freshness import OFFSET_BITS, Embeddings, ForeignEvents, Sent, served_s


def _key(user: int, offset: int) -> int:
    return user << OFFSET_BITS | offset


def _sent() -> Sent:
    sent = Sent([0, 7])
    sent.add(0, 0, [10, 11], 1.000)
    sent.add(0, 2, [10], 1.010)
    sent.add(1, 7, [12], 1.005)
    return sent


def test_an_event_is_served_by_the_first_embedding_that_contains_it() -> None:
    """A later offset of the same user serves it too, a repeated embedding counts once, another user's never."""
    sent = np.array([_key(1, 3), _key(1, 5), _key(2, 4), _key(2, 9)])
    received = np.array([_key(1, 5), _key(2, 4), _key(1, 5), _key(3, 20)])
    served = served_s(sent, received, np.array([10.0, 11.0, 12.0, 13.0]))
    assert served.tolist()[:3] == [10.0, 10.0, 11.0]
    assert np.isnan(served[3])


def test_without_embeddings_nothing_is_served() -> None:
    """No embedding at all leaves every event unserved."""
    none = np.zeros(0, np.int64)
    assert np.isnan(served_s(np.array([_key(1, 1)]), none, none.astype(np.float64))).all()


def test_freshness_of_an_embedding_is_received_minus_sent_of_the_newest_event_inside() -> None:
    """Partition and source offset name the event; an event that is not known, before or after, has no freshness."""
    partition, offset = np.array([0, 1, 0, 1, 1]), np.array([1, 7, 2, 9, 6])
    zeros = np.zeros(5, np.int64)
    freshness_ms = Embeddings(zeros, partition, offset, zeros, np.full(5, 1.030)).freshness_ms(_sent())
    assert freshness_ms[:3].round(3).tolist() == [30, 25, 20]
    assert np.isnan(freshness_ms[3:]).all()


def test_events_have_their_users_and_times_as_columns() -> None:
    """Every event is named by user and offset, also in a topic that held records before."""
    keys, at_s = _sent().columns()
    assert keys.tolist() == [_key(10, 0), _key(11, 1), _key(10, 2), _key(12, 7)]
    assert at_s.tolist() == [1.000, 1.000, 1.010, 1.005]
    assert (len(_sent()), _sent().end(0), _sent().end(1)) == (4, 3, 8)


def test_events_of_another_producer_are_an_error() -> None:
    """An acknowledged offset that is not the next one means a second producer: offsets no longer name our events."""
    with pytest.raises(ForeignEvents, match="offset 5 of partition 0 where 3 was next"):
        _sent().add(0, 5, [4], 1.020)
