"""Builders of batches and states for tests of the core."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from encoder.actions.columns import ACTION_DTYPE, ActionBatch, name_code
from streams.core.layout import StateLimits, nothing_stored
from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy

LIMITS = StateLimits(sequence_length=8, chunk_length=2, hot_users_max=32, wake_users_max=100)


def batch(
    users: Sequence[bytes],
    times_ms: Sequence[int],
    *,
    offset: int = 0,
    event_ids: Sequence[int] | None = None,
    actions: Sequence[str] | None = None,
    tombstones: Sequence[bool] | None = None,
    arrival_ms: Sequence[int] | None = None,
) -> ActionBatch:
    """Return events at consecutive offsets from `offset`; the item of each is its offset + 1.

    By default an event arrives at its event time.
    """
    count = len(users)
    rows = np.zeros(count, ACTION_DTYPE)
    rows["timestamp_ms"] = times_ms
    rows["item"] = np.arange(offset, offset + count) + 1
    rows["event_id"] = event_ids if event_ids is not None else 0
    rows["action"] = [name_code(name) for name in actions] if actions is not None else name_code("see")
    is_tombstone = np.array(tombstones if tombstones is not None else [False] * count, np.bool_)
    arrived = np.array(times_ms if arrival_ms is None else arrival_ms, np.int64)
    return ActionBatch(list(users), rows, np.arange(offset, offset + count), is_tombstone, arrived)


def state_of(policy: TriggerPolicy, users: Sequence[bytes], limits: StateLimits = LIMITS) -> PartitionState:
    """Return a state in which `users` are in memory and new."""
    state = PartitionState(policy, limits)
    state.load(users, nothing_stored(len(users), limits))
    return state


def items_of(state: PartitionState, user: bytes) -> list[int]:
    """Return the items of a user in memory, oldest first."""
    sequences = state._sequences
    actions, _ = sequences.kept(sequences.rows_of([user]))
    items: list[int] = actions["item"].tolist()
    return items
