"""Queries on a timeline are answered from the events before each, whatever the batches and the room for states."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.actions.columns import ACTION_DTYPE, item_key, name_code
from infra.harness.feature_model import Event, values
from streams.batch import features
from streams.batch.features import Timeline, compute
from streams.core.features.definitions import DAY_MS, HOUR_MS
from streams.core.features.state import FeatureRecords, FeatureState
from tests.unit.core.features.definitions import TOML
from tests.unit.core.features.histories import ATTRIBUTES, EVENT, FEATURES, FUNCTIONS, ITEMS, SPANS_MS, START_MS
from tests.unit.features.agreement import agrees

WHOLE = [{**table, "k": 99} if "group" in table else table for table in tomllib.loads(TOML)["feature"]]
"""The definitions with whole rankings."""
END_MS = START_MS + SPANS_MS[-1]
USERS = st.integers(0, 3)
TIMES = st.one_of(
    st.integers(START_MS - DAY_MS, END_MS + 30 * DAY_MS), st.sampled_from([0, START_MS, END_MS, END_MS + HOUR_MS])
)
Query = tuple[int, int]
"""A user, and the time as of which its values are wanted."""


def timeline(events: list[tuple[int, Event]], queries: list[Query]) -> Timeline:
    """Return events and queries in order: by user, by time, queries before events."""
    rows = [(user, at, -1) for user, at in queries]
    rows += [(user, event.timestamp_ms, number) for number, (user, event) in enumerate(events)]
    rows.sort(key=lambda row: (row[0], row[1], row[2] >= 0, row[2]))
    actions, numbers = np.zeros(len(rows), ACTION_DTYPE), np.full(len(rows), math.nan)
    actions["timestamp_ms"] = [at for _, at, _ in rows]
    for place, (_, _, number) in enumerate(rows):
        if number >= 0:
            event = events[number][1]
            codes = item_key(event.item), name_code(event.action), name_code(event.surface)
            actions[place] = (*codes, event.timestamp_ms, event.duration_ms, 0)
            numbers[place] = math.nan if event.value is None else event.value
    is_query = np.array([number < 0 for _, _, number in rows], np.bool_)
    return Timeline(np.array([user for user, _, _ in rows], np.int64), actions, numbers, is_query)


def cut(whole: Timeline, cuts: list[int]) -> list[Timeline]:
    """Return the timeline in batches."""
    return [whole.slice(low, high) for low, high in pairwise([0, *sorted(cuts), len(whole)])]


def answers(batches: list[Timeline], state_bytes_max: int = features.STATE_BYTES_MAX) -> list[FeatureRecords]:
    """Return the answers of each batch."""
    return list(compute(batches, FEATURES, ATTRIBUTES, FUNCTIONS, state_bytes_max))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(USERS, EVENT), max_size=40),
    st.lists(st.tuples(USERS, TIMES), max_size=12),
    st.lists(st.integers(0, 52), max_size=4),
    st.integers(1, 3),
    st.data(),
)
def test_answers_are_those_of_the_model(
    events: list[tuple[int, Event]], queries: list[Query], cuts: list[int], states: int, data: st.DataObject
) -> None:
    """Every answer is that of the model, also with room for one user, batches within a user, and equal times."""
    events = [(user, replace(event, arrival=arrival)) for arrival, (user, event) in enumerate(events)]
    times = [event.timestamp_ms for _, event in events]
    queries += [
        (user, at) for user, at in data.draw(st.lists(st.tuples(USERS, st.sampled_from(times or [0])), max_size=9))
    ]
    whole = timeline(events, queries)
    batches = cut(whole, [min(each, len(whole)) for each in cuts])
    found = answers(batches, states * FeatureState.row_bytes(FEATURES))
    assert [len(each.values) for each in found] == [int(batch.is_query.sum()) for batch in batches]
    texts = [text for each in found for text in each.values]
    asked = sorted(queries)
    for text, (user, as_of_ms) in zip(texts, asked, strict=True):
        wanted = values(WHOLE, [event for of, event in events if of == user], as_of_ms, ITEMS)
        decoded = json.loads(text)
        for feature in FEATURES.features:
            assert agrees(feature, decoded[feature.name], wanted[feature.name]), (user, as_of_ms, feature.name)


def test_what_happens_at_the_time_itself_does_not_count() -> None:
    """A query as of t sees the event at t - 1 and not the one at t; two queries of one time have one answer."""
    events = [(0, Event("item-1", "view", START_MS)), (0, Event("item-2", "view", START_MS + 1))]
    (found,) = answers([timeline(events, [(0, START_MS + each) for each in (0, 1, 1, 2)])])
    assert [json.loads(text)["last"] for text in found.values] == [[], ["item-1"], ["item-1"], ["item-2", "item-1"]]


def test_validity_and_estimates_belong_to_their_rows() -> None:
    """A row's `valid_until_ms` and the names of its estimates are those of its own user and time."""
    events = [(1, Event(f"other-{n}", "view", START_MS + n)) for n in range(300)]
    (found,) = answers([timeline(events, [(0, END_MS), (1, START_MS + 10), (1, START_MS + HOUR_MS), (2, START_MS)])])
    assert found.estimated == [(), (), ("items",), ()]
    assert (found.valid_until_ms >= 2**62).tolist() == [True, False, False, True]


@pytest.mark.parametrize("cuts", [[], [1], [1, 2]])
@pytest.mark.parametrize("times", [[(START_MS + 5, False), (START_MS, True)], [(START_MS, False), (START_MS, True)]])
def test_a_timeline_out_of_order_is_refused(times: list[tuple[int, bool]], cuts: list[int]) -> None:
    """An event before a query of the same or an earlier time would leak into the answer, so it raises."""
    actions = np.zeros(2, ACTION_DTYPE)
    actions["timestamp_ms"] = [at for at, _ in times]
    whole = Timeline(np.zeros(2, np.int64), actions, np.zeros(2), np.array([is_query for _, is_query in times]))
    with pytest.raises(ValueError, match="not in order"):
        answers(cut(whole, cuts))


def test_an_empty_timeline_has_no_answers() -> None:
    """Without rows, and with events alone, there is nothing to answer."""
    (nothing,) = answers([timeline([], [])])
    (events,) = answers([timeline([(0, Event("item-1", "view", START_MS))], [])])
    assert (nothing.values, events.values) == ([], [])
    assert answers([]) == []
