"""The figures of the freshness benchmark."""

from __future__ import annotations

import numpy as np

from infra.bench.stream.freshness import take_over
from infra.bench.stream.traffic import Outcome


def test_take_over_ends_when_the_last_silent_partition_has_embeddings_again() -> None:
    """Two of four partitions are silent after the kill; the others, and pauses before the kill, do not count."""
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
        received_s=np.array([at for _, at in received]),
        received_partition=np.array([partition for partition, _ in received]),
        drain_s=0.0,
    )
    assert take_over(outcome, killed_s=10.0) == 24.0
