"""Completeness: the share of its window that a feature has seen, by kind, and how it is kept."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.harness.feature_model import Event
from streams.core.features.completeness import LATEST_MS
from streams.core.features.definitions import DAY_MS, HOUR_MS, MINUTE_MS
from streams.core.features.state import FeatureState
from tests.unit.core.features.histories import ATTRIBUTES, EVENT, FEATURES, FUNCTIONS, START_MS, USERS, add_events

NAMES = [each.name for each in FEATURES.features]
ROWS = np.arange(USERS)
AS_OF_MS = START_MS + 100 * DAY_MS
NEWEST_MS = START_MS + 40 * DAY_MS
"""Time of the newest events of a history, or shortly after it."""
SPANS_MS = (0, 30 * MINUTE_MS, HOUR_MS, 4 * HOUR_MS, 7 * DAY_MS, 28 * DAY_MS, 30 * DAY_MS)
TIMES = st.one_of(
    st.just(0),
    st.builds(
        lambda span_ms, later_ms: NEWEST_MS - span_ms + later_ms,
        st.sampled_from(SPANS_MS),
        st.one_of(st.integers(-DAY_MS, DAY_MS), st.sampled_from([0, 1, -1])),
    ),
)


def shares(state: FeatureState, as_of_ms: int) -> list[dict[str, float]]:
    """Return the shares of all users, which must be those of the reference."""
    at = np.full(USERS, as_of_ms)
    found = state.records(ROWS, at).completeness
    assert found == state.values(ROWS, at).completeness
    return found


def share(name: str, from_ms: int, events: list[Event]) -> float:
    """Return the share of one feature of a user with these events, which is complete from a time."""
    state = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    add_events(state, [(1, event) for event in events])
    state.set_complete_from(np.array([1]), [name], np.array([from_ms]))
    nothing, found = shares(state, AS_OF_MS)
    assert nothing == {}
    assert set(found) <= {name}
    return found.get(name, 1.0)


@pytest.mark.parametrize(
    ("name", "from_ms", "wanted"),
    [
        ("watched", AS_OF_MS - 7 * DAY_MS, 1.0),  # the window begins at a day, as `AS_OF_MS` is one
        ("watched", AS_OF_MS - 7 * DAY_MS + 1, 0.9999),
        ("watched", AS_OF_MS - 3 * DAY_MS, 0.4285),
        ("watched", AS_OF_MS, 0.0),
        ("watched", AS_OF_MS + DAY_MS, 0.0),
        ("items", AS_OF_MS - 3 * DAY_MS, 0.4285),
        ("top", AS_OF_MS - 7 * DAY_MS, 0.25),
        ("views", AS_OF_MS - 15 * MINUTE_MS, 0.25),
        ("affinity", AS_OF_MS - 15 * DAY_MS, 0.5),
        ("affinity", AS_OF_MS - 30 * DAY_MS, 1.0),
        ("depth", AS_OF_MS - 15 * MINUTE_MS, 0.5),
        ("length", AS_OF_MS - 30 * MINUTE_MS, 1.0),
        ("last", 1, 0.0),
        ("since", 1, 0.0),
    ],
)
def test_without_an_event_a_share_is_that_of_the_window(name: str, from_ms: int, wanted: float) -> None:
    """A window has seen what lies after the time; nothing is known of the last events."""
    assert share(name, from_ms, []) == wanted


def test_the_last_events_are_certain_if_they_are_not_older() -> None:
    """Two of three places are certain when the third event is older; the time since one needs only that one."""
    events = [Event(f"item-{n}", "buy", AS_OF_MS - n * DAY_MS, "home") for n in (1, 2, 3)]
    assert share("last", AS_OF_MS - 3 * DAY_MS, events) == 1.0
    assert share("last", AS_OF_MS - 3 * DAY_MS + 1, events) == 0.6666
    assert share("since", AS_OF_MS - DAY_MS, events) == 1.0
    assert share("since", AS_OF_MS - DAY_MS + 1, events) == 0.0


def test_a_session_is_certain_from_one_gap_before_it() -> None:
    """The session began 20 minutes ago, so what lies up to 50 minutes back could belong to it."""
    events = [Event("item-1", "view", AS_OF_MS - minutes * MINUTE_MS) for minutes in (20, 5)]
    assert share("depth", AS_OF_MS - 50 * MINUTE_MS, events) == 1.0
    assert share("length", AS_OF_MS - 50 * MINUTE_MS + 1, events) == 0.9999
    assert share("length", AS_OF_MS - 25 * MINUTE_MS, events) == 0.5


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, USERS - 1), EVENT), max_size=20),
    st.lists(TIMES, min_size=len(NAMES), max_size=len(NAMES)),
    st.sampled_from([1, HOUR_MS, DAY_MS - 1, 7 * DAY_MS, 60 * DAY_MS]),
)
def test_completeness_is_packed(batch: list[tuple[int, Event]], times_ms: list[int], later_ms: int) -> None:
    """A user in another place has the same shares as of every time after the newest event; what is over is not kept."""
    stayed, moved = (FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS) for _ in range(2))
    add_events(stayed, batch)
    stayed.set_complete_from(ROWS, NAMES, np.array([times_ms, [0] * len(NAMES)]))
    moved.set_complete_from(ROWS, NAMES[:3], np.full(USERS, 77))
    moved.unpack(ROWS, stayed.pack(ROWS))
    as_of_ms = max((event.timestamp_ms for _, event in batch), default=START_MS) + later_ms
    found = shares(stayed, as_of_ms)
    assert shares(moved, as_of_ms) == found
    assert found[1] == {}
    kept = moved.complete_from_ms(ROWS)[0].tolist()
    assert all(mine in (0, theirs) for mine, theirs in zip(kept, times_ms, strict=True))


def test_what_is_over_is_not_packed() -> None:
    """Events at the end of every window make a feature complete for good, and the user as short as any other."""
    state = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    events = [Event(f"item-{n % 4 + 1}", "buy", AS_OF_MS + n * DAY_MS, "home", 5, 1.0) for n in range(9)]
    add_events(state, [(row, event) for row in ROWS.tolist() for event in events])
    add_events(state, [(row, Event("item-1", "view", AS_OF_MS + 9 * DAY_MS)) for row in ROWS.tolist()])
    state.set_complete_from(np.array([0]), NAMES, np.array([AS_OF_MS - 60 * DAY_MS]))
    short, other = state.pack(ROWS)
    assert short == other
    state.set_complete_from(np.array([0]), NAMES, np.array([AS_OF_MS]))
    assert len(state.pack(ROWS)[0]) > len(other)


def test_what_is_not_over_is_packed() -> None:
    """A week that ends with the day of the newest event is not over when it began a moment before the time."""
    state = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    add_events(state, [(0, Event("item-1", "view", AS_OF_MS + 1))])
    for early_ms in (0, -1):
        state.set_complete_from(ROWS[:1], ["watched"], np.array([AS_OF_MS - 7 * DAY_MS - early_ms]))
        state.unpack(ROWS[1:], state.pack(ROWS[:1]))
        assert bool(state.complete_from_ms(ROWS[1:]).any()) == bool(early_ms)


def test_sessions_are_complete_once_eight_are_certain() -> None:
    """A late event may still join the oldest session that is kept, so its time is kept until that one is certain."""
    state = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    add_events(state, [(0, Event("item-1", "view", AS_OF_MS + n * HOUR_MS)) for n in range(8)])
    for from_ms, is_kept in ((AS_OF_MS - 30 * MINUTE_MS, False), (AS_OF_MS - 30 * MINUTE_MS + 1, True)):
        state.set_complete_from(ROWS[:1], ["depth"], np.array([from_ms]))
        state.unpack(ROWS[1:], state.pack(ROWS[:1]))
        assert state.complete_from_ms(ROWS[1:]).any() == is_kept
    add_events(state, [(1, Event("item-1", "view", AS_OF_MS + n * HOUR_MS // 4)) for n in range(29)])
    assert state.records(ROWS[1:], np.array([AS_OF_MS + 7 * HOUR_MS + 1])).completeness == [{"depth": 0.9999}]


def test_clearing_makes_complete() -> None:
    """A cleared row, and a time of 0, mean that all events are contained."""
    state = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    for undo in (state.clear, lambda rows: state.set_complete_from(rows, NAMES, np.zeros(len(rows), np.int64))):
        state.set_complete_from(ROWS, NAMES, np.array([AS_OF_MS, 2**62]))
        assert state.complete_from_ms(ROWS).tolist() == [[AS_OF_MS] * len(NAMES), [LATEST_MS] * len(NAMES)]
        by_user: list[Mapping[str, float]] = [*shares(state, AS_OF_MS)]
        assert all(len(each) == len(NAMES) for each in by_user)
        undo(ROWS)
        assert not state.complete_from_ms(ROWS).any()
        assert shares(state, AS_OF_MS) == [{}, {}]


def test_no_users() -> None:
    """No user is no work."""
    state, nobody = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS), np.zeros(0, np.int64)
    state.set_complete_from(nobody, NAMES, nobody)
    state.clear(nobody)
    state.unpack(nobody, state.pack(nobody))
    assert state.records(nobody, nobody).completeness == []
    assert state.complete_from_ms(nobody).shape == (0, len(NAMES))
