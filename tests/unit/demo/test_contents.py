"""The recount compares contents: what cancels in the count of a user is found."""

from __future__ import annotations

import numpy as np
import pytest

from encoder.actions.columns import ACTION_DTYPE, ActionBatch, Actions
from infra.demo.contents import Differences, compare_contents, compare_user
from infra.demo.histories import recompute
from streams.core.layout import StateLimits, StoredSequences, nothing_stored
from streams.core.partition_state import PartitionState
from streams.core.triggers import TriggerPolicy
from streams.storage.codec import encode
from streams.storage.memory_store import MemoryStore
from streams.storage.reader import read_users

USERS = [b"ann", b"bob"]
LIMITS = StateLimits(sequence_length=8, chunk_length=4)
EVENTS = [(0, 10), (1, 11), (0, 20), (0, 30), (1, 31), (0, 40), (0, 50), (1, 60)]
"""(user, event time) of the input in order of arrival."""


def _actions(events: list[tuple[int, int]]) -> Actions:
    """Return actions with one item per event time and no event ids, so that the state applies every event."""
    actions = np.zeros(len(events), ACTION_DTYPE)
    actions["item"] = actions["timestamp_ms"] = [time_ms for _, time_ms in events]
    return actions


def _state(events: list[tuple[int, int]]) -> StoredSequences:
    """Return the state of a worker that has applied these events, as read from changelog records."""
    state, count = PartitionState(TriggerPolicy(), LIMITS), len(events)
    state.load(USERS, nothing_stored(len(USERS), LIMITS))
    names = [USERS[user] for user, _ in events]
    columns = np.arange(count), np.zeros(count, np.bool_), np.full(count, 1_000)
    state.apply(ActionBatch(names, _actions(events), *columns), 1_000)
    store = MemoryStore()
    store.write(encode(state.begin_checkpoint(), LIMITS), 0)
    return read_users(store, USERS, LIMITS).stored


def _differences(applied: list[tuple[int, int]], events: list[tuple[int, int]] = EVENTS) -> Differences:
    actions = _actions(events)
    users = np.array([user for user, _ in events])
    histories = recompute(2, users, actions["timestamp_ms"], actions["event_id"], LIMITS.sequence_length)
    return compare_contents(histories, actions, _state(applied), LIMITS.sequence_length)


def test_the_state_of_a_correct_worker_has_no_differences() -> None:
    """Every event applied once, in order of arrival: nothing is reported."""
    assert _differences(EVENTS) == Differences()


def test_a_lost_and_a_doubled_event_of_one_user_are_both_found() -> None:
    """The count of the user is right, its contents are not: one action is lost and one is doubled."""
    applied = [event for event in EVENTS if event != (0, 30)] + [(0, 40)]
    assert sum(user == 0 for user, _ in applied) == sum(user == 0 for user, _ in EVENTS)
    assert _differences(applied) == Differences(lost=1, duplicated=1)


@pytest.mark.parametrize("place", range(len(EVENTS)))
def test_a_lost_event_is_found_at_every_place(place: int) -> None:
    """The first, the last and every other event counts as lost if it was not applied."""
    assert _differences(EVENTS[:place] + EVENTS[place + 1 :]) == Differences(lost=1)


@pytest.mark.parametrize("event", EVENTS)
def test_a_doubled_event_is_found_at_every_place(event: tuple[int, int]) -> None:
    """The first, the last and every other event counts as doubled if it was applied twice."""
    assert _differences([*EVENTS, event]) == Differences(duplicated=1)


def test_displaced_actions_count_neither_as_lost_nor_as_doubled() -> None:
    """In a full sequence a doubled event displaces the oldest action, and a lost one leaves room for an older."""
    events = [(0, time_ms) for time_ms in range(1, 13)]
    assert _differences(events, events) == Differences()
    assert _differences([*events, (0, 9)], events) == Differences(duplicated=1)
    assert _differences([event for event in events if event != (0, 9)], events) == Differences(lost=1)
    both = [event for event in events if event != (0, 7)] + [(0, 9)]
    assert _differences(both, events) == Differences(lost=1, duplicated=1)


def test_a_changed_action_counts_as_lost_and_doubled() -> None:
    """An action whose content differs in one byte is not the one that was sent."""
    assert _differences([(0, 99) if event == (0, 50) else event for event in EVENTS]) == Differences(1, 1)


def test_the_right_actions_in_the_wrong_order_are_found() -> None:
    """Order is part of the contents."""
    assert compare_user([b"a", b"b", b"c"], [b"a", b"c", b"b"], 3, 8) == Differences(misordered=1)
