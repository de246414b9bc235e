"""Tiles agree with a plain list of events, in whatever order and division the events come."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.harness.feature_model import Event, values
from streams.core.features.definitions import DAY_MS, HOUR_MS, Feature, parse_features
from streams.core.features.tiles import Events, Ring

USERS = 3
TABLES = [
    {"name": f"{kind}_{window}_{of}", "kind": kind, "window": window}
    | ({"of": of} if kind != "count" else {})
    | ({"actions": ["buy"]} if window == "1d" else {})
    for window in ("5m", "1h", "1d", "3d", "7d", "28d")
    for kind in ("count", "sum", "mean", "min", "max")
    for of in ("duration", "value")
    if kind != "count" or of == "value"
]
START_MS = 20_000 * DAY_MS
EVENT = st.builds(
    Event,
    item=st.just("i"),
    action=st.sampled_from(["buy", "view"]),
    timestamp_ms=st.one_of(
        st.integers(START_MS, START_MS + 40 * DAY_MS), st.integers(START_MS + 39 * DAY_MS, START_MS + 40 * DAY_MS)
    ),
    duration_ms=st.integers(0, 2**32 - 1),
    value=st.one_of(st.none(), st.floats(-1e6, 1e6)),
)


def toml(tables: list[dict[str, object]]) -> str:
    """Return tables as TOML."""
    shown = [[f"{key} = {value!r}".replace("'", '"') for key, value in table.items()] for table in tables]
    return "\n".join("[[feature]]\n" + "\n".join(lines) for lines in shown)


FEATURES = parse_features(toml(TABLES)).features


def columns(batch: list[tuple[int, Event]]) -> Events:
    """Return events, each with its user's row, as columns."""
    events = [event for _, event in batch]
    is_buy = np.array([event.action == "buy" for event in events], np.bool_)
    durations = np.array([event.duration_ms or np.nan for event in events], np.float64)
    numbers = np.array([np.nan if event.value is None else event.value for event in events], np.float64)
    return Events(
        rows=np.array([row for row, _ in batch], np.int64),
        timestamp_ms=np.array([event.timestamp_ms for event in events], np.int64),
        items=np.ones(len(events), np.int64),
        passes={each.filter: is_buy if each.filter.actions else np.ones(len(events), np.bool_) for each in FEATURES},
        numbers={"duration": durations, "value": numbers},
        surfaces=np.zeros(len(events), np.int64),
        groups={},
    )


def rings(features: tuple[Feature, ...] = FEATURES) -> list[Ring]:
    """Return one ring for each hop."""
    hops = sorted({each.hop_ms for each in features})
    return [Ring(hop, [each for each in features if each.hop_ms == hop], USERS) for hop in hops]


def agree(found: float, wanted: float | None) -> bool:
    """Return whether a value is that of the model."""
    return math.isnan(found) if wanted is None else math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-5)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, USERS - 1), EVENT), max_size=40),
    st.lists(st.integers(0, 40), max_size=4),
    st.sampled_from([0, 1, 299_999, HOUR_MS, DAY_MS - 1, 7 * DAY_MS, 60 * DAY_MS]),
)
def test_values_are_those_of_the_model(batch: list[tuple[int, Event]], cuts: list[int], later_ms: int) -> None:
    """Events of any order, in any division into batches, and any time after them give the model's values."""
    all_rings = rings()
    bounds = [0, *sorted(min(cut, len(batch)) for cut in cuts), len(batch)]
    for low, high in itertools.pairwise(bounds):
        for ring in all_rings:
            ring.add(columns(batch[low:high]))
    newest_ms = max((event.timestamp_ms for _, event in batch), default=START_MS)
    as_of_ms = np.full(USERS, newest_ms + 1 + later_ms)
    for ring in all_rings:
        found, until_ms = ring.values(np.arange(USERS), as_of_ms)
        for user in range(USERS):
            events = [event for row, event in batch if row == user]
            tables = [table for table in TABLES if table["name"] in found]
            wanted = values(tables, events, int(as_of_ms[user]), {})
            assert all(agree(found[name][user], value) for name, value in wanted.items()), (found, wanted)
            before = values(tables, events, int(min(until_ms[user], as_of_ms[user] + 100 * DAY_MS)), {})
            assert before == wanted or until_ms[user] <= as_of_ms[user] + 100 * DAY_MS


@settings(max_examples=100)
@given(st.lists(EVENT, min_size=1, max_size=20), st.integers(0, 30 * DAY_MS))
def test_nothing_changes_before_the_stated_time(events: list[Event], later_ms: int) -> None:
    """Until `valid-until` every value stays; at it, an event leaves a window."""
    newest_ms = max(event.timestamp_ms for event in events)
    as_of_ms = newest_ms + 1 + later_ms
    for ring in rings():
        ring.add(columns([(0, event) for event in events]))
        _, until_ms = ring.values(np.zeros(1, np.int64), np.array([as_of_ms]))
        tables = [table for table in TABLES if table["name"] in {each.name for each in ring.features}]
        wanted = values(tables, events, as_of_ms, {})
        if until_ms[0] > as_of_ms + 100 * DAY_MS:
            assert not any(wanted[table["name"]] for table in tables)
            continue
        assert until_ms[0] > as_of_ms
        assert values(tables, events, int(until_ms[0]) - 1, {}) == wanted
        counts = [table for table in tables if table["kind"] == "count"]
        changed = values(tables, events, int(until_ms[0]), {})
        assert not counts or changed != wanted or all(event.action == "view" for event in events)


def test_a_cleared_user_begins_anew() -> None:
    """After `clear` a user has no value, and others keep theirs."""
    for ring in rings():
        ring.add(columns([(0, Event("i", "buy", START_MS, value=2.0)), (1, Event("i", "buy", START_MS, value=2.0))]))
        ring.clear(np.array([0]))
        found, _ = ring.values(np.arange(2), np.array([START_MS + 1] * 2))
        counts = [found[each.name] for each in ring.features if each.kind == "count"]
        assert all(each.tolist() == [0, 1] for each in counts)
        ring.add(columns([(0, Event("i", "buy", START_MS, value=3.0))]))
        assert [found[each.name][1] for each in ring.features if each.kind == "count"]
