"""Features with lanes, when there are more ids or values than lanes: estimates that say so, wherever the user was."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.harness.feature_model import Event
from streams.core.features.attributes import Attributes
from streams.core.features.definitions import DAY_MS, HOUR_MS, FeatureSet, parse_features
from streams.core.features.rankings import TILE_COUNT_MAX
from streams.core.features.state import FeatureState
from tests.unit.core.features.histories import FUNCTIONS, START_MS, add_events

TOML = """
[[feature]]
name = "affinity"
kind = "decayed_affinity"
group = "color"
half_life = "1d"
k = 2
cap = 3
[[feature]]
name = "items"
kind = "distinct"
of = "item"
window = "1d"
cap = 4
[[feature]]
name = "top"
kind = "top_k"
group = "color"
window = "7d"
k = 2
cap = 3
"""
COLORS = [f"color-{number}" for number in range(6)]
ITEMS = {f"item-{number}": {"color": COLORS[number % 6]} for number in range(24)}
ATTRIBUTES, OTHER = Attributes.of(ITEMS), Attributes.of({"first": {"color": "amber"}, **ITEMS})
"""In the second every code is another."""
FEATURES = parse_features(TOML, ATTRIBUTES.names)
EVENT = st.builds(
    Event,
    item=st.sampled_from(list(ITEMS)),
    action=st.just("view"),
    timestamp_ms=st.integers(0, 40).map(lambda hours: START_MS + hours * 6 * HOUR_MS),
)
ROW = np.zeros(1, np.int64)


def new(feature_set: FeatureSet = FEATURES, attributes: Attributes = ATTRIBUTES) -> FeatureState:
    """Return a state with two rows."""
    return FeatureState(feature_set, attributes, 2, FUNCTIONS)


def add(state: FeatureState, events: list[Event], row: int = 0) -> None:
    """Add events of one user."""
    add_events(state, [(row, event) for event in events])


def found(state: FeatureState, as_of_ms: int, row: int = 0) -> tuple[bytes, int, tuple[str, ...]]:
    """Return values, their end and the estimates of one user, which must be those of the reference."""
    records, columns = (each(np.array([row]), np.array([as_of_ms])) for each in (state.records, state.values))
    assert records.valid_until_ms.tolist() == columns.valid_until_ms.tolist()
    assert set(records.estimated[0]) == {name for name, column in columns.estimated.items() if column[0]}
    return records.values[0], int(records.valid_until_ms[0]), records.estimated[0]


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENT, max_size=60), st.lists(st.integers(0, 60), max_size=3), st.integers(1, 20 * DAY_MS))
def test_a_user_that_was_stored_is_one_that_stayed(events: list[Event], cuts: list[int], later_ms: int) -> None:
    """What is dropped depends on the events alone: not on lanes, on codes of values, or on where the user was."""
    stayed, moved = new(), new()
    for low, high in pairwise([0, *sorted(min(cut, len(events)) for cut in cuts), len(events)]):
        add(stayed, events[low:high])
        add(moved, events[low:high])
        through = new(attributes=OTHER)
        through.unpack(ROW, moved.pack(ROW))
        moved.unpack(ROW, through.pack(ROW))
    as_of_ms = max((event.timestamp_ms for event in events), default=START_MS) + later_ms
    assert found(moved, as_of_ms) == found(stayed, as_of_ms)


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENT, max_size=60), st.integers(1, 20 * DAY_MS))
def test_what_is_not_called_an_estimate_is_exact(events: list[Event], later_ms: int) -> None:
    """Counts that are not estimates are those of all events in the window, also after there were too many values."""
    state = new()
    add(state, events)
    as_of_ms = max((event.timestamp_ms for event in events), default=START_MS) + later_ms
    values = state.values(ROW, np.array([as_of_ms])).values
    _, _, estimated = found(state, as_of_ms)
    by_name = {each.name: each for each in FEATURES.features}
    inside = [each for each in events if each.timestamp_ms >= by_name["items"].begin_ms(as_of_ms)]
    if "items" not in estimated:
        assert values["items"] == [len({each.item for each in inside})]
    if "top" not in estimated:
        week = [each for each in events if each.timestamp_ms >= by_name["top"].begin_ms(as_of_ms)]
        counts = Counter(ITEMS[each.item]["color"] for each in week)
        assert values["top"] == [[[*pair] for pair in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:2]]]
    if len({ITEMS[each.item]["color"] for each in events}) <= 3:
        assert not {"affinity", "top"} & {*estimated}
    if len({each.item for each in events}) <= 4:
        assert "items" not in estimated


def test_the_least_value_is_dropped_and_of_equal_ones_the_last_name() -> None:
    """The fourth color takes the lane of the color with one event whose name is last."""
    state = new()
    colors = [0, 0, 2, 1, 3, 3, 3]
    add(state, [Event(f"item-{color}", "view", START_MS + n) for n, color in enumerate(colors)])
    for row in (0, 1):
        values = state.values(np.array([row]), np.array([START_MS + 10])).values
        assert values["top"] == ([[["color-3", 3], ["color-0", 2]]] if row == 0 else [[]])
    add(state, [Event("item-1", "view", START_MS + 7 + n) for n in range(3)])
    values = state.values(ROW, np.array([START_MS + 20])).values
    assert values["top"] == [[["color-1", 4], ["color-3", 3]]]
    assert [name for name, _ in values["affinity"][0]] == ["color-1", "color-3"]


def test_a_ranking_is_exact_again_when_what_was_dropped_has_left_the_window() -> None:
    """Eight days after the last event of a dropped value, the ranking is no estimate; sums with decay remain one."""
    state = new()
    add(state, [Event(f"item-{color}", "view", START_MS) for color in range(5)])
    assert found(state, START_MS + 7 * DAY_MS + 1)[2] == ("affinity", "top")
    add(state, [Event("item-5", "view", START_MS + 8 * DAY_MS)])
    value, until_ms, estimated = found(state, START_MS + 8 * DAY_MS + 1)
    assert estimated == ("affinity",)
    assert b'"top":[["color-5",1]]' in value
    assert until_ms == START_MS + 9 * DAY_MS + HOUR_MS
    state.unpack(ROW, state.pack(ROW))
    assert found(state, START_MS + 8 * DAY_MS + 1) == (value, until_ms, estimated)


@pytest.mark.parametrize("excess", [0, 1])
def test_a_tile_counts_up_to_its_limit(excess: int) -> None:
    """65,535 events of a value in one hop are exact; one more makes an estimate, until that hop has left the window."""
    state = new()
    event = Event("item-1", "view", START_MS)
    add(state, [event] * (TILE_COUNT_MAX + excess))
    for _ in range(2):
        value, _, estimated = found(state, START_MS + 1)
        assert b'"top":[["color-1",65535]]' in value
        assert estimated == (("top",) if excess else ())
        state.unpack(ROW, state.pack(ROW))
    assert found(state, START_MS + 8 * DAY_MS)[2] == ()


@settings(max_examples=100, deadline=None)
@given(st.lists(EVENT, max_size=30), st.randoms(use_true_random=False))
def test_sums_with_decay_do_not_depend_on_the_order(events: list[Event], random: object) -> None:
    """With enough lanes, any order of the events gives the same sums, up to the rounding of additions."""
    wide = FeatureSet(tuple(replace(each, cap=64, k=6) for each in FEATURES.features if each.name == "affinity"))
    states = [new(wide) for _ in range(2)]
    add(states[0], events)
    shuffled = [*events]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    add(states[1], shuffled)
    at = np.array([START_MS + 11 * DAY_MS])
    first, second = (dict(state.values(ROW, at).values["affinity"][0]) for state in states)
    assert first.keys() == second.keys()
    assert all(math.isclose(first[name], second[name], rel_tol=1e-12) for name in first)


def test_sums_with_decay_over_years() -> None:
    """A pause of 3,000 half-lives leaves nothing of older events, and no number that is not finite."""
    state = new()
    add(state, [Event("item-1", "view", START_MS), Event("item-2", "view", START_MS + 3_000 * DAY_MS)])
    add(state, [Event("item-1", "view", START_MS + 1), Event("item-3", "view", START_MS + 2_999 * DAY_MS)])
    state.unpack(ROW, state.pack(ROW))
    values = state.values(ROW, np.array([START_MS + 3_000 * DAY_MS])).values
    assert values["affinity"] == [[["color-2", 1.0], ["color-3", 0.5]]]
    assert found(state, START_MS + 9_000 * DAY_MS)[0] == b'{"affinity":[],"items":0,"top":[]}'


def test_the_widest_lanes() -> None:
    """1,024 lanes over 90 days, each used in each tile, come back as they were."""
    table = Attributes.of({f"i{number}": {"color": f"c{number}"} for number in range(1_100)})
    features = parse_features(
        '[[feature]]\nname = "top"\nkind = "top_k"\ngroup = "color"\nwindow = "90d"\nk = 100\ncap = 1024\n'
        '[[feature]]\nname = "items"\nkind = "distinct"\nof = "item"\nwindow = "90d"\ncap = 1024',
        table.names,
    )
    state = FeatureState(features, table, 2, FUNCTIONS)
    for day in range(91):
        add(state, [Event(f"i{number}", "view", START_MS + day * DAY_MS) for number in range(1_100) for _ in range(2)])
    packed = state.pack(ROW)
    state.unpack(ROW + 1, packed)
    assert state.pack(ROW + 1) == packed
    at = START_MS + 91 * DAY_MS
    value, until_ms, estimated = found(state, at)
    assert found(state, at, 1) == (value, until_ms, estimated)
    assert estimated == ("items", "top")
    assert b'["c0",180]' in value
