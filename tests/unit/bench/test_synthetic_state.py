"""A worker can read the synthetic changelog as its own."""

from __future__ import annotations

import numpy as np
import pytest
from aiokafka.partitioner import murmur2

from infra.bench.stream.synthetic_state import FIRST_USER, USERS_MAX, _snapshots, partition_of, user_id
from streams.core.layout import StateLimits
from streams.storage.codec import encode
from streams.storage.memory_store import MemoryStore
from streams.storage.reader import read_users

LIMITS = StateLimits(sequence_length=64, chunk_length=16)


def test_users_are_partitioned_as_any_producer_does() -> None:
    """The columnar partition of every id is that of Kafka's murmur2 of its bytes, at both ends of the numbers too."""
    numbers = np.concatenate((FIRST_USER + np.arange(500), FIRST_USER + USERS_MAX - 1 - np.arange(500)))
    theirs = [(murmur2(user_id(number)) & 0x7FFFFFFF) % 7 for number in numbers.tolist()]
    assert partition_of(numbers, 7).tolist() == theirs


@pytest.mark.parametrize("actions", [8, 64])
def test_every_user_is_read_back_whole(actions: int) -> None:
    """Heads and chunks of all users decode; each user occurs once, with all its actions in event-time order."""
    store = MemoryStore()
    users: list[bytes] = []
    for snapshot in _snapshots(np.random.default_rng(1), FIRST_USER + np.arange(300), actions, LIMITS):
        store.write(encode(snapshot, LIMITS), len(users))
        users += snapshot.users
    read = read_users(store, users, LIMITS)
    assert sorted(users) == [user_id(FIRST_USER + number) for number in range(300)]
    assert not read.corrupt
    times_ms = read.stored.actions["timestamp_ms"].reshape(300, actions)
    assert (read.stored.headers["count"] == actions).all()
    assert (np.diff(times_ms, axis=1) >= 0).all()
    assert (times_ms[:, 0] > 0).all()
