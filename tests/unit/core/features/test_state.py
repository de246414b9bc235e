"""Every kind of feature agrees with the model, for every order of the events and every division into batches."""

from __future__ import annotations

import math
import tomllib
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.harness.feature_model import Event, values
from streams.core.features.definitions import DAY_MS, HOUR_MS, MINUTE_MS, parse_features
from streams.core.features.state import DamagedFeatures, FeatureState, OtherFeatureSet
from streams.core.features.tiles import NEVER_MS
from tests.unit.core.features.definitions import TOML
from tests.unit.core.features.histories import (
    ATTRIBUTES,
    EVENT,
    FEATURES,
    FUNCTIONS,
    ITEMS,
    MORE,
    START_MS,
    USERS,
    add_events,
)
from tests.unit.core.features.values import agrees, near_tie

ONLY_VIEWS = ("views", "longest")
TABLES: list[dict[str, Any]] = tomllib.loads(TOML)["feature"]


def test_a_long_batch_is_added_like_its_events_one_by_one() -> None:
    """A batch of more events than the kernel takes at once gives the state that the same events give one by one."""
    rng = np.random.default_rng(3)
    names = [*ITEMS, "unknown"]
    events = [
        Event(
            names[n % len(names)], "buy" if n % 3 else "view", START_MS + n, ["", "home", "search"][n % 5 % 3], n, n / 7
        )
        for n in rng.integers(1_000, size=700).tolist()
    ]
    batch = [(n % USERS, event) for n, event in enumerate(events)]
    whole, single = (FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS) for _ in range(2))
    add_events(whole, batch)
    for each in batch:
        add_events(single, [each])
    assert whole.pack(np.arange(USERS)) == single.pack(np.arange(USERS))


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, USERS - 1), EVENT), max_size=40),
    st.lists(st.integers(0, 40), max_size=4),
    st.sampled_from([0, 1, 299_999, 30 * 60_000, HOUR_MS, DAY_MS - 1, 7 * DAY_MS, 60 * DAY_MS]),
)
def test_values_are_those_of_the_model(batch: list[tuple[int, Event]], cuts: list[int], later_ms: int) -> None:
    """All features of users, after any events, are those of a plain list of these events."""
    batch = [(row, replace(event, arrival=arrival)) for arrival, (row, event) in enumerate(batch)]
    state = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS)
    for low, high in pairwise([0, *sorted(min(cut, len(batch)) for cut in cuts), len(batch)]):
        add_events(state, batch[low:high])
    newest_ms = max((event.timestamp_ms for _, event in batch), default=START_MS)
    as_of_ms = np.full(USERS, newest_ms + 1 + later_ms)
    columns = state.values(np.arange(USERS), as_of_ms)
    for user in range(USERS):
        events = [event for row, event in batch if row == user]
        wanted = values(TABLES, events, int(as_of_ms[user]), ITEMS)
        for name, value in wanted.items():
            found = columns.values[name][user]
            tie = name == "affinity" and near_tie(
                values(
                    [{**table, "k": 9} for table in TABLES if table["name"] == name], events, int(as_of_ms[user]), ITEMS
                )[name]
            )
            assert tie or agrees(found, value), (name, found, value)


@settings(max_examples=100)
@given(st.lists(EVENT, min_size=1, max_size=20), st.integers(0, 30 * DAY_MS))
def test_no_value_changes_before_the_stated_time(events: list[Event], later_ms: int) -> None:
    """Until `valid_until_ms` every value stays, but for those that always age; and something leaves a window then."""
    state = FeatureState(FEATURES, ATTRIBUTES, 1, FUNCTIONS)
    add_events(state, [(0, event) for event in events])
    as_of_ms = max(event.timestamp_ms for event in events) + 1 + later_ms
    until_ms = int(state.values(np.zeros(1, np.int64), np.array([as_of_ms])).valid_until_ms[0])
    steady = [table for table in TABLES if table["name"] not in ("since", "affinity")]
    wanted = values(steady, events, as_of_ms, ITEMS)
    if until_ms > as_of_ms + 100 * DAY_MS:
        windowed = [table for table in steady if "window" in table or "gap" in table]
        assert not any(values(windowed, events, as_of_ms, ITEMS).values())
        return
    assert until_ms > as_of_ms
    assert values(steady, events, until_ms - 1, ITEMS) == wanted
    counts = [{**table, "kind": "count"} for table in steady if "window" in table or "gap" in table]
    counts = [
        {key: each[key] for key in each if key not in ("of", "group", "k")} for each in counts if "window" in each
    ]
    counts += [table for table in steady if "gap" in table]
    assert values(counts, events, until_ms, ITEMS) != values(counts, events, as_of_ms, ITEMS)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, USERS - 1), EVENT), max_size=60),
    st.integers(0, 60),
    st.sampled_from([0, HOUR_MS, 7 * DAY_MS, 60 * DAY_MS]),
)
def test_what_is_packed_comes_back(batch: list[tuple[int, Event]], cut: int, later_ms: int) -> None:
    """A user that is packed, unpacked in another row and acts again has the values of one that stayed in memory."""
    stayed, moved = FeatureState(FEATURES, ATTRIBUTES, USERS, FUNCTIONS), FeatureState(FEATURES, MORE, 5, FUNCTIONS)
    add_events(stayed, batch[:cut])
    packed = stayed.pack(np.arange(USERS))
    rows = np.array([4, 1])
    add_events(moved, [(4, Event("item-1", "buy", START_MS, "home", 5, 1.0))])  # what was in the row is replaced
    moved.unpack(rows, packed)
    assert moved.pack(rows) == packed
    add_events(stayed, batch[cut:])
    add_events(moved, [(int(rows[row]), event) for row, event in batch[cut:]])
    newest_ms = max((event.timestamp_ms for _, event in batch), default=START_MS)
    as_of_ms = np.full(USERS, newest_ms + 1 + later_ms)
    found, wanted = moved.values(rows, as_of_ms), stayed.values(np.arange(USERS), as_of_ms)
    assert found.values == wanted.values
    assert found.valid_until_ms.tolist() == wanted.valid_until_ms.tolist()


@settings(max_examples=300)
@given(st.lists(EVENT, max_size=30), st.binary(max_size=8), st.integers(0, 400), st.booleans())
def test_damaged_bytes_are_refused_or_read(events: list[Event], noise: bytes, place: int, is_cut: bool) -> None:
    """Bytes that were altered or cut raise, or are the state of some user; they never reach other memory."""
    state = FeatureState(FEATURES, ATTRIBUTES, 3, FUNCTIONS)
    add_events(state, [(1, event) for event in events])
    (whole,) = state.pack(np.array([1]))
    damaged = whole[:place] if is_cut else whole[:place] + noise + whole[place + len(noise) :]
    neighbours = state.pack(np.array([0, 2]))
    try:
        state.unpack(np.array([1]), [damaged])
    except DamagedFeatures:
        assert damaged != whole
    except OtherFeatureSet:
        assert damaged[:9] != whole[:9]
    assert state.pack(np.array([0, 2])) == neighbours


def test_an_estimate_says_so_and_is_near() -> None:
    """With 5,000 items in the window and room for 64, the count is an estimate within a few standard errors."""
    state = FeatureState(FEATURES, ATTRIBUTES, 1, FUNCTIONS)
    rng = np.random.default_rng(7)
    for _ in range(10):
        batch = [
            (0, Event(f"i{rng.integers(5_000)}", "view", START_MS + int(rng.integers(DAY_MS)))) for _ in range(2_000)
        ]
        add_events(state, batch)
    columns = state.values(np.zeros(1, np.int64), np.array([START_MS + DAY_MS]))
    assert columns.estimated["items"].tolist() == [True]
    assert abs(columns.values["items"][0] / 4_900 - 1) < 4 / math.sqrt(64)
    later = state.values(np.zeros(1, np.int64), np.array([START_MS + 30 * DAY_MS]))
    assert later.values["items"] == [0]
    assert later.estimated["items"].tolist() == [False]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 13)), min_size=3, max_size=25), st.integers(1, HOUR_MS))
def test_an_estimate_holds_until_the_stated_time(events: list[tuple[int, int]], later_ms: int) -> None:
    """It also ends when the last id that was dropped leaves the window, since the count is exact from then on."""
    small = parse_features('[[feature]]\nname = "few"\nkind = "distinct"\nof = "item"\nwindow = "30m"\ncap = 2\n')
    state, row = FeatureState(small, ATTRIBUTES, 1, FUNCTIONS), np.zeros(1, np.int64)
    add_events(state, [(0, Event(f"i{item}", "view", START_MS + hop * 5 * MINUTE_MS)) for item, hop in events])
    as_of_ms = np.array([START_MS + max(hop for _, hop in events) * 5 * MINUTE_MS + later_ms])
    now = state.records(row, as_of_ms)
    if now.valid_until_ms[0] < NEVER_MS:
        assert now.valid_until_ms[0] > as_of_ms[0]
        assert state.records(row, now.valid_until_ms - 1).values == now.values


def test_a_cleared_user_begins_anew() -> None:
    """After `clear` a user's values are those of a user without events."""
    state = FeatureState(FEATURES, ATTRIBUTES, 2, FUNCTIONS)
    add_events(
        state, [(row, Event("item-1", "buy", START_MS + n, "home", 5, 1.0)) for row in range(2) for n in range(5)]
    )
    state.clear(np.array([0]))
    found = state.values(np.arange(2), np.full(2, START_MS + 10)).values
    nothing = values(TABLES, [], START_MS + 10, ITEMS)
    assert {name: column[0] for name, column in found.items()} == nothing
    assert all(column[1] != nothing[name] for name, column in found.items() if name not in ONLY_VIEWS)
