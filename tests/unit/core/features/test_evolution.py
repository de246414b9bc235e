"""Changed definitions: what is kept, what is computed from the kept actions, and what is said to be incomplete."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.harness.feature_model import Event, Values, values
from streams.core.features.definitions import (
    DAY_MS,
    HOUR_MS,
    DamagedDefinitions,
    FeatureSet,
    parse_features,
)
from streams.core.features.state import Attributes, DamagedFeatures, FeatureState, OtherFeatureSet
from tests.unit.core.features.definitions import TOML
from tests.unit.core.features.histories import (
    ATTRIBUTES,
    EVENT,
    FEATURES,
    FUNCTIONS,
    ITEMS,
    START_MS,
    USERS,
    actions_of,
    add_events,
)
from tests.unit.core.features.values import agrees, near_tie

Tables = list[dict[str, Any]]
FORMER: Tables = tomllib.loads(TOML)["feature"]
CHANGES: dict[str, dict[str, Any]] = {
    "renamed": {"name": "seen", "kind": "count", "actions": ["view"], "window": "1h"},
    "longer": {"name": "watched", "kind": "sum", "of": "duration", "window": "28d"},
    "shorter": {"name": "price", "kind": "mean", "of": "value", "window": "7d", "where": {"color": ["red", "blue"]}},
    "other length of tiles": {"name": "views", "kind": "count", "actions": ["view"], "window": "1d"},
    "other filter": {"name": "views", "kind": "count", "actions": ["buy"], "window": "1h"},
    "a mean where there is a sum": {"name": "mean", "kind": "mean", "of": "duration", "window": "7d"},
    "of a value": {"name": "dearest", "kind": "max", "of": "value", "window": "7d"},
    "more lanes": {"name": "top", "kind": "top_k", "group": "color", "window": "28d", "k": 3},
    "longer ranking": {"name": "top", "kind": "top_k", "group": "color", "window": "90d", "k": 2},
    "more places": {"name": "last", "kind": "last_k", "k": 4},
    "other gap": {"name": "depth", "kind": "session_depth", "gap": "1h"},
    "length where there is a depth": {"name": "length", "kind": "session_length", "gap": "30m"},
    "other half-life": {"name": "affinity", "kind": "decayed_affinity", "group": "color", "half_life": "1d", "k": 2},
    "since any": {"name": "since", "kind": "seconds_since"},
    "distinct": {"name": "items", "kind": "distinct", "of": "item", "window": "14d"},
}
KEPT = {"seen", "watched", "price", "length"}
ROWS = np.arange(USERS)


def defined(tables: Tables, version: str = "") -> FeatureSet:
    """Return the feature set of TOML tables."""
    text = "\n".join(
        "[[feature]]\n" + "\n".join(f"{key} = {_toml(value)}" for key, value in table.items()) for table in tables
    )
    return parse_features(text, ATTRIBUTES.names, version)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    return repr(value)


def moved(old: FeatureState, tables: Tables, kept: list[list[Event]], complete_from_ms: list[int]) -> FeatureState:
    """Return a state of other definitions that took over from `old`, with the kept events of each user."""
    state = FeatureState(defined(tables), ATTRIBUTES, 7, FUNCTIONS)
    names = state.take_over(ROWS + 3, old, ROWS)
    starts = np.array([0, *np.cumsum([len(each) for each in kept])])
    actions = actions_of([event for each in kept for event in each])
    state.rebuild(ROWS + 3, names, actions, starts, np.array(complete_from_ms))
    return state


def check(state: FeatureState, tables: Tables, user: int, events: list[list[Event]], as_of_ms: int) -> None:
    """Compare the values of a user with the model; `events` holds what each feature has seen."""
    found = {
        name: column[0] for name, column in state.values(np.array([user + 3]), np.array([as_of_ms])).values.items()
    }
    for table, seen in zip(tables, events, strict=True):
        wanted: Values = values([table], seen, as_of_ms, ITEMS)
        full: Values = values([{**table, "k": 9}], seen, as_of_ms, ITEMS) if table["kind"] == "decayed_affinity" else {}
        tie = any(near_tie(each) for each in full.values())
        name = table["name"]
        assert tie or agrees(found[name], wanted[name]), (name, found[name], wanted[name])


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, USERS - 1), EVENT), max_size=30),
    st.lists(st.tuples(st.integers(0, USERS - 1), EVENT), max_size=10),
    st.sets(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=6),
    st.sampled_from([4, 1_000]),
    st.sampled_from([1, HOUR_MS, 7 * DAY_MS, 40 * DAY_MS]),
)
def test_each_feature_is_that_of_the_events_it_has_seen(
    before: list[tuple[int, Event]],
    after: list[tuple[int, Event]],
    changes: set[str],
    length: int,
    later_ms: int,
) -> None:
    """Kept features have all events since they are complete, rebuilt ones the kept actions, and all have later ones."""
    before = [(row, replace(event, arrival=arrival)) for arrival, (row, event) in enumerate(before)]
    after = [(row, replace(event, arrival=100 + arrival)) for arrival, (row, event) in enumerate(after)]
    by_name = {CHANGES[each]["name"]: CHANGES[each] for each in changes}
    tables = [*by_name.values(), *(each for each in FORMER if each["name"] not in by_name)]
    old = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    add_events(old, before)
    histories = [
        sorted((e for row, e in before if row == user), key=lambda e: (e.timestamp_ms, e.arrival))
        for user in range(USERS)
    ]
    kept = [each[-length:] for each in histories]
    from_ms = [
        each[0].timestamp_ms + 1 if len(each) < len(all_) else 0 for each, all_ in zip(kept, histories, strict=True)
    ]
    state = moved(old, tables, kept, from_ms)
    complete = {
        each.name: state.complete_from_ms(ROWS + 3)[:, at] for at, each in enumerate(state.feature_set.features)
    }
    add_events(state, [(row + 3, event) for row, event in after])
    as_of_ms = max((event.timestamp_ms for _, event in [*before, *after]), default=START_MS) + later_ms
    former = [*FORMER, *(CHANGES[each] for each in CHANGES if CHANGES[each]["name"] in KEPT)]
    for user in range(USERS):
        late = [event for row, event in after if row == user]
        seen = []
        for table in tables:
            is_kept = table in former
            known = histories[user] if is_kept else kept[user]
            if table.get("of") == "value" or is_kept:
                known = [each for each in known if each.timestamp_ms >= complete[table["name"]][user]]
            else:
                assert complete[table["name"]][user] == from_ms[user]
            seen.append(known + late)
        check(state, tables, user, seen, as_of_ms)


def test_a_longer_window_is_complete_from_the_oldest_tile() -> None:
    """A week has 8 tiles, so a month that takes them over is complete from the begin of the eighth day before now."""
    old = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    add_events(old, [(0, Event("item-1", "view", START_MS + day * DAY_MS + HOUR_MS, "", 7)) for day in range(40)])
    state = moved(old, [CHANGES["longer"]], [[], []], [0, 0])
    assert state.complete_from_ms(ROWS + 3)[:, 0].tolist() == [START_MS + 32 * DAY_MS, 0]
    records = state.records(ROWS + 3, np.full(USERS, START_MS + 40 * DAY_MS))
    assert records.values[0] == b'{"watched":56.0}'
    assert records.completeness == [{"watched": 0.2857}, {}]


def test_the_former_daily_ring_reaches_as_far_as_its_longest_window() -> None:
    """A count over 28 days lets a sum of the same ring begin with 8 tiles only, since no window needed more."""
    names = {each["name"]: each for each in FORMER}
    old = FeatureState(defined([names["watched"], names["price"]]), ATTRIBUTES, USERS, FUNCTIONS)
    add_events(old, [(0, Event("item-1", "view", START_MS + day * DAY_MS, "", 7, 1.0)) for day in range(40)])
    through = FeatureState(old.feature_set, ATTRIBUTES, USERS, FUNCTIONS)
    through.unpack(ROWS, old.pack(ROWS))
    for each in (old, through):
        state = moved(each, [CHANGES["longer"]], [[], []], [0, 0])
        assert state.records(np.array([3]), np.array([START_MS + 40 * DAY_MS])).values == [b'{"watched":56.0}']


def test_unchanged_definitions_keep_everything() -> None:
    """Nothing is to be rebuilt, and the values stay bit by bit, also under other names."""
    old = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    add_events(old, [(n % 2, Event(item, "buy", START_MS + n, "home", n, 1.5)) for n, item in enumerate(ITEMS)])
    old.set_complete_from(ROWS, ["items"], np.array([5, 6]))
    renamed = FeatureSet(tuple(replace(each, name=f"{each.name}2") for each in FEATURES.features))
    state = FeatureState(renamed, ATTRIBUTES, USERS, FUNCTIONS)
    assert state.take_over(ROWS, old, ROWS) == []
    at = np.full(USERS, START_MS + 10)
    assert {name[:-1]: column for name, column in state.values(ROWS, at).values.items()} == old.values(ROWS, at).values
    assert state.complete_from_ms(ROWS).tolist() == old.complete_from_ms(ROWS).tolist()


def test_other_attributes_are_counted_again() -> None:
    """With another attribute file, what depends on attributes is not kept, and all else is."""
    old = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    state = FeatureState(defined(FORMER, "2"), Attributes.of(ITEMS, "2"), USERS, FUNCTIONS)
    assert set(state.take_over(ROWS, old, ROWS)) == {"price", "top", "affinity"}


def test_an_attribute_that_is_gone_is_an_attribute_without_values() -> None:
    """Definitions of a former attribute file are read and unpacked, so that other features can be taken over."""
    old = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    add_events(old, [(0, Event("item-1", "view", START_MS, "home", 5, 1.0))])
    gone = FeatureState(FEATURES, Attributes.of({}), USERS, FUNCTIONS)
    gone.unpack(ROWS, old.pack(ROWS))
    add_events(gone, [(1, Event("item-1", "view", START_MS, "home", 5, 1.0))])
    records = gone.records(ROWS, np.full(USERS, START_MS + 1))
    assert b'"top":[]' in records.values[0]
    assert records.estimated == [("affinity", "top"), ()]
    assert b'"watched":5.0' in records.values[0]
    assert b'"watched":5.0' in records.values[1]


def test_packed_users_of_another_feature_set_are_refused_with_its_version() -> None:
    """The version that the bytes carry is in the error, the rows are empty, and shorter bytes are damaged."""
    old, state = (FeatureState(each, ATTRIBUTES, USERS, FUNCTIONS) for each in (FEATURES, defined([CHANGES["longer"]])))
    add_events(state, [(0, Event("item-1", "view", START_MS, "home", 5, 1.0))])
    (own, _), (other, _) = state.pack(ROWS), old.pack(ROWS)
    with pytest.raises(OtherFeatureSet, match=FEATURES.version) as caught:
        state.unpack(ROWS, [own, other])
    assert caught.value.version == FEATURES.version
    assert state.records(ROWS[:1], np.array([START_MS + 1])).values == [b'{"watched":0.0}']
    with pytest.raises(DamagedFeatures, match="user 1 of 2: 8 bytes"):
        state.unpack(ROWS, [own, other[:8]])
    with pytest.raises(DamagedFeatures, match="format 2 is unknown, this release reads 1"):
        state.unpack(ROWS, [b"\x02" + own[1:], own])


def test_rebuilding_twice_is_rebuilding_once() -> None:
    """A feature that is rebuilt begins from nothing, and one that is not named stays."""
    state = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    events = [Event("item-1", "view", START_MS + n * DAY_MS, "home", 5, 1.0) for n in range(9)]
    add_events(state, [(0, event) for event in events])
    before, at = state.pack(ROWS), np.full(USERS, START_MS + 9 * DAY_MS)
    actions, starts = actions_of(events[-3:]), np.array([0, 3, 3])
    for _ in range(2):
        state.rebuild(ROWS, ["watched", "items"], actions, starts, np.array([START_MS + 5 * DAY_MS + 1, 0]))
        found = state.values(ROWS, at)
        assert found.values["watched"] == [15.0, 0.0]
        assert found.values["last"][0] == ["item-1"] * 3
        assert found.completeness == [{"items": 0.5714, "watched": 0.5714}, {}]
    state.rebuild(ROWS, ["watched", "items"], actions_of(events), np.array([0, 9, 9]), np.zeros(2, np.int64))
    assert state.pack(ROWS) == before


def test_actions_outside_the_kept_tiles() -> None:
    """An action before the ring's oldest tile is left out, and one after its newest begins a tile for all features."""
    state = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    add_events(state, [(0, Event("item-1", "view", START_MS + 29 * DAY_MS, "home", 5, 1.0))])
    for days, watched, price in (((0, 29), 7.0, 1.0), ((29, 58), 7.0, None)):
        events = [Event("item-1", "view", START_MS + day * DAY_MS, "home", 7, 1.0) for day in days]
        state.rebuild(ROWS, ["watched"], actions_of(events), np.array([0, 2, 2]), np.zeros(2, np.int64))
        found = state.values(ROWS[:1], np.array([events[-1].timestamp_ms + 1])).values
        assert (found["watched"], found["price"]) == ([watched], [price])


def test_the_most_complete_of_two_former_features_is_believed() -> None:
    """Two counts share their tiles, so both hold what either has seen."""
    tables = [{"name": f"n{days}", "kind": "count", "window": f"{days}d"} for days in (7, 14)]
    old = FeatureState(defined(tables), ATTRIBUTES, USERS, FUNCTIONS)
    old.set_complete_from(ROWS, ["n14"], np.array([START_MS, START_MS]))
    state = moved(old, [{"name": "n", "kind": "count", "window": "10d"}], [[], []], [0, 0])
    assert state.complete_from_ms(ROWS + 3).tolist() == [[0], [0]]


def test_more_users_than_are_rebuilt_together() -> None:
    """The users of a large call are those of many small ones, whoever has no action among them."""
    state = FeatureState(FEATURES, ATTRIBUTES, 600, FUNCTIONS)
    counts = np.arange(600) % 3
    starts = np.array([0, *np.cumsum(counts)])
    events = [Event("item-1", "buy", START_MS + 1 + n, "home", 5) for n in range(starts[-1])]
    state.rebuild(
        np.arange(600), ["depth", "views", "since", "price"], actions_of(events), starts, np.zeros(600, np.int64)
    )
    found = state.values(np.arange(600), np.full(600, START_MS + 2_000))
    assert found.values["depth"] == counts.tolist()
    assert found.values["since"][599] == (2_000 - starts[-1]) / 1_000
    price = [each.name for each in FEATURES.features].index("price")
    from_ms = state.complete_from_ms(np.arange(600))[:, price]
    assert from_ms.tolist() == [
        START_MS + 1 + end if count else 0 for end, count in zip(starts[1:], counts, strict=True)
    ]


def test_no_users_and_no_names() -> None:
    """Nothing to do is done."""
    state = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    nobody = np.zeros(0, np.int64)
    assert state.take_over(nobody, state, nobody) == []
    state.rebuild(nobody, ["depth"], actions_of([]), np.zeros(1, np.int64), nobody)
    state.rebuild(ROWS, [], actions_of([]), np.zeros(3, np.int64), np.zeros(2, np.int64))
    assert not state.complete_from_ms(ROWS).any()


def test_definitions_are_stored_as_json() -> None:
    """What is read back is equal and has the same version."""
    for each in (FEATURES, FeatureSet(()), defined(FORMER, "version 2")):
        again = FeatureSet.from_json(each.as_json())
        assert again == each
        assert again.version == each.version
        assert FeatureSet.from_json(each.as_json().encode()) == each


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"features": 3, "attributes": ""}',
        '{"features": [3], "attributes": ""}',
        '{"features": [{}], "attributes": ""}',
        FEATURES.as_json()[:-1],
        FEATURES.as_json().replace('"count"', '"counts"'),
        FEATURES.as_json().replace('"k": 3', '"k": "3"'),
        FEATURES.as_json().replace('"cap": 64', '"cap": null'),
        FEATURES.as_json().replace('"name"', '"names"'),
        b"\xff",
    ],
)
def test_damaged_definitions_are_refused(text: str) -> None:
    """Text that is not a feature set raises one error."""
    with pytest.raises(DamagedDefinitions):
        FeatureSet.from_json(text)
