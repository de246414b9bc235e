"""Values as JSON, compiled: the same as the slow reference for every history."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.harness.feature_model import Event
from streams.core.features.definitions import DAY_MS, HOUR_MS, FeatureSet
from streams.core.features.state import FeatureState
from tests.unit.core.features.histories import (
    ATTRIBUTES,
    EVENT,
    FEATURES,
    FUNCTIONS,
    ITEMS,
    START_MS,
    USERS,
    add_events,
)

ROWS = np.arange(USERS)
SPANS_MS = (0, 1, 299_999, HOUR_MS, DAY_MS - 1, 7 * DAY_MS, 60 * DAY_MS)


def same(state: FeatureState, as_of_ms: int) -> list[bytes]:
    """Check that the records of all users are the values of the reference; return the JSON objects."""
    at = np.full(USERS, as_of_ms)
    records, columns = state.records(ROWS, at), state.values(ROWS, at)
    assert records.valid_until_ms.tolist() == columns.valid_until_ms.tolist()
    assert records.completeness == columns.completeness
    for user, text in enumerate(records.values):
        found = json.loads(text)
        wanted = {name: column[user] for name, column in columns.values.items()}
        assert list(found) == list(wanted)
        assert found == wanted
        assert [type(each) for each in found.values()] == [type(each) for each in wanted.values()]
        estimates = tuple(name for name, column in columns.estimated.items() if column[user])
        assert set(records.estimated[user]) == set(estimates)
    return records.values


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, USERS - 1), EVENT), max_size=40), st.sampled_from(SPANS_MS))
def test_records_are_the_values(batch: list[tuple[int, Event]], later_ms: int) -> None:
    """Each JSON object has the names in order, and the numbers, texts and types of `values`."""
    state = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    add_events(state, batch)
    same(state, max((event.timestamp_ms for _, event in batch), default=START_MS) + 1 + later_ms)


def test_estimates_are_named() -> None:
    """A user with more items than lanes has estimates, the other user has none."""
    state = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    add_events(state, [(1, Event(f"other-{n}", "view", START_MS + n)) for n in range(300)])
    same(state, START_MS + HOUR_MS)
    assert state.records(ROWS, np.full(USERS, START_MS + HOUR_MS)).estimated == [(), ("items",)]


def test_numbers_are_the_shortest_that_are_read_back() -> None:
    """Numbers of every magnitude come back bit by bit; a sum that no number can hold is null."""
    numbers = [5.0, -0.0, 0.1, 1e-5, 5e-324, 2.0**53, 123456789012345680.0, 1e22, 1.7976931348623157e308, -2.5e-300]
    for number in numbers:
        state = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
        add_events(state, [(0, Event("item-1", "view", START_MS, value=number))])
        text = same(state, START_MS + 1)[0]
        found = json.loads(text)["least"]
        assert isinstance(found, float)
        assert found.hex() == number.hex()
        written = text.partition(b'"least":')[2].partition(b",")[0]
        assert len(written) <= len(repr(number)) + 3, written
    state = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    add_events(state, [(0, Event("item-1", "view", START_MS + n, value=1.7e308)) for n in range(2)])
    assert json.loads(same(state, START_MS + 10)[0])["price"] is None


def test_texts_are_escaped() -> None:
    """Ids and names with quotes, line ends and any letters are valid JSON, and an unknown item is its key."""
    state = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    add_events(state, [(0, Event(item, "view", START_MS + n)) for n, item in enumerate([*ITEMS, "unknown"])])
    found = json.loads(same(state, START_MS + DAY_MS)[0])
    assert found["last"][1:] == list(ITEMS)[:-3:-1]
    assert len(found["last"][0]) == 16


def test_more_users_than_there_is_room_for_at_first() -> None:
    """The output grows with the number of users, and no user is the same as no work."""
    state = FeatureState(FEATURES, ATTRIBUTES, 3, FUNCTIONS)
    add_events(state, [(1, Event(item, "buy", START_MS)) for item in ITEMS])
    rows = np.arange(9_000) % 3
    records = state.records(rows, np.full(len(rows), START_MS + 1))
    assert records.values == [*state.records(np.arange(3), np.full(3, START_MS + 1)).values] * 3_000
    assert records.values[1] != records.values[0]
    nothing = state.records(rows[:0], np.zeros(0, np.int64))
    assert (nothing.values, nothing.estimated, len(nothing.valid_until_ms)) == ([], [], 0)


def test_a_feature_set_without_features_is_an_empty_object() -> None:
    """No feature at all is valid JSON too."""
    state = FeatureState(FeatureSet(()), ATTRIBUTES, 1, FUNCTIONS)
    assert state.records(np.zeros(1, np.int64), np.zeros(1, np.int64)).values == [b"{}"]
