"""How the freshness benchmark counts: an event is served by the first embedding that contains it."""

from __future__ import annotations

import numpy as np

from infra.bench.stream.freshness import take_over
from infra.bench.stream.traffic import OFFSET_BITS, Outcome, serve


def _key(user: int, offset: int) -> int:
    return user << OFFSET_BITS | offset


def test_an_event_is_served_by_the_first_embedding_that_contains_it() -> None:
    """A later offset of the same user serves it too, a repeated embedding counts once, another user's never."""
    sent = np.array([_key(1, 3), _key(1, 5), _key(2, 4), _key(2, 9)])
    received = np.array([_key(1, 5), _key(2, 4), _key(1, 5), _key(3, 20)])
    served = serve(sent, received, np.array([10.0, 11.0, 12.0, 13.0]))
    assert served.tolist()[:3] == [10.0, 10.0, 11.0]
    assert np.isnan(served[3])


def test_without_embeddings_nothing_is_served() -> None:
    """No embedding at all leaves every event unserved."""
    none = np.zeros(0, np.int64)
    assert np.isnan(serve(np.array([_key(1, 1)]), none, none.astype(np.float64))).all()


def test_take_over_ends_when_the_last_silent_partition_speaks_again() -> None:
    """Of four partitions two fall silent at the kill; those that go on, and pauses before the kill, do not count."""
    received = [
        (0, 1.0),
        (0, 9.0),
        (1, 9.9),
        (1, 22.0),
        (2, 9.9),
        (2, 24.0),
        (3, 10.5),
        (3, 11.2),
        (0, 10.9),
        (0, 11.5),
    ]
    none = np.zeros(0)
    outcome = Outcome(
        sent_s=none,
        served_s=none,
        partition=none.astype(np.int64),
        received_s=np.array([at for _, at in received]),
        received_partition=np.array([partition for partition, _ in received]),
        drain_s=0.0,
    )
    assert take_over(outcome, killed_s=10.0) == 24.0
