"""A thousand random histories with late, repeated and deleted events: the state, the model and the oracle in SQL agree.

Each history is one user's records in order of arrival. Event times are near the boundaries of hops and windows. The
state gets the events that count in order of arrival, in batches cut at random; the model gets them as a list; the query
gets the records as they are, and decides by itself which of them count.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from encoder.actions.columns import ACTION_DTYPE, item_key, name_code
from infra.harness import feature_model
from streams.core.features.attributes import Attributes
from streams.core.features.definitions import DAY_MS, HOUR_MS, MINUTE_MS, parse_features
from streams.core.features.state import FeatureState
from streams.features_kernel import load_functions
from tests.unit.features import feature_sql
from tests.unit.features.agreement import agrees
from tests.unit.features.twenty import TOML, WHOLE

SEED, HISTORIES = 20_261_201, 1_000
START_MS = 20_000 * DAY_MS
GRIDS_MS = (1_000, 5 * MINUTE_MS, HOUR_MS, DAY_MS)
PLATFORMS = ("linux", "osx", "it's", "windows", "common", "чёрный")
ITEMS = {
    f"item '{number}'": {"platform": PLATFORMS[number % 6]} | ({"letters": f"n{number % 9}"} if number % 4 else {})
    for number in range(12)
} | {"item 12": {}}
ATTRIBUTES = Attributes.of(ITEMS)
FEATURES = parse_features(TOML, ATTRIBUTES.names)
ACTIONS = ("merged_create", "merged_edit", "proposed_edit")
SURFACES = ("", "en", "de", "zh")


@dataclass(frozen=True)
class Record:
    """A record of one user as it arrives; without an event it is a deletion."""

    timestamp_ms: int
    event_id: str = ""
    event: feature_model.Event | None = None


@dataclass(frozen=True)
class History:
    """The records of one user in order of arrival, and times as of which values are compared."""

    records: list[Record]
    as_of_ms: list[int]
    counted: list[feature_model.Event] = field(default_factory=list)
    """Events that count."""


def time_ms(rng: np.random.Generator) -> int:
    """Return a time within 40 days, on or next to a boundary of hops."""
    grid = int(rng.choice(GRIDS_MS))
    span = int(rng.choice([HOUR_MS, 2 * DAY_MS, 40 * DAY_MS]))
    return START_MS - int(rng.integers(span // grid + 1)) * grid + int(rng.choice([-1, 0, 0, 1]))


def history(rng: np.random.Generator) -> History:
    """Return a random history; it is judged by the rules of the stream, event by event."""
    records: list[Record] = []
    for arrival in range(int(rng.integers(40))):
        at = time_ms(rng)
        if rng.random() < 0.04:
            records.append(Record(at))
            continue
        event = feature_model.Event(
            item=str(rng.choice(list(ITEMS))),
            action=str(rng.choice(ACTIONS)),
            timestamp_ms=at,
            surface=str(rng.choice(SURFACES)),
            duration_ms=int(rng.integers(3) * rng.integers(10_000)),
            value=None if rng.random() < 0.3 else float(rng.normal() * 100),
            arrival=arrival,
        )
        records.append(Record(at, f"id{rng.integers(30)}" if rng.random() < 0.5 else "", event))
    counted = [event for _, event in events_that_count(records)]
    newest = max((event.timestamp_ms for event in counted), default=START_MS)
    window = int(rng.choice([HOUR_MS, DAY_MS, 7 * DAY_MS, 28 * DAY_MS]))
    boundary = (newest // DAY_MS + 1 + int(rng.integers(30))) * DAY_MS
    oldest_leaves = int(rng.choice([event.timestamp_ms for event in counted] or [START_MS])) + window
    gap = int(rng.choice([30 * MINUTE_MS, DAY_MS])) + int(rng.integers(2))  # the session ends 1 ms after the gap
    random = newest + int(rng.integers(1, 60 * DAY_MS))
    times = [newest + 1, newest + gap, boundary, oldest_leaves, oldest_leaves + 1, random]
    return History(records, [at for at in times if at > newest], counted)


def events_that_count(records: list[Record]) -> list[tuple[int, feature_model.Event]]:
    """Return the events that are left in the end, each with the number of its record."""
    left: list[tuple[int, feature_model.Event]] = []
    ids: set[str] = set()
    forgotten_ms = -1
    for number, record in enumerate(records):
        if record.event is None:
            left, ids, forgotten_ms = [], set(), max(forgotten_ms, record.timestamp_ms)
        elif record.timestamp_ms > forgotten_ms and (not record.event_id or record.event_id not in ids):
            left.append((number, record.event))
            ids.add(record.event_id)
    return left


def feed(state: FeatureState, row: int, records: list[Record], rng: np.random.Generator) -> None:
    """Apply the records of a user in random batches; a deletion clears the row."""
    held: list[feature_model.Event] = []
    ids: set[str] = set()
    forgotten_ms = -1

    def flush() -> None:
        actions = np.zeros(len(held), ACTION_DTYPE)
        for at, event in enumerate(held):
            codes = item_key(event.item), name_code(event.action), name_code(event.surface)
            actions[at] = (*codes, event.timestamp_ms, event.duration_ms, 0)
        numbers = np.array([math.nan if event.value is None else event.value for event in held], np.float64)
        state.add(np.full(len(held), row), actions, numbers)
        held.clear()

    for record in records:
        if record.event is None:
            flush()
            state.clear(np.array([row]))
            ids, forgotten_ms = set(), max(forgotten_ms, record.timestamp_ms)
        elif record.timestamp_ms > forgotten_ms and not (record.event_id and record.event_id in ids):
            held.append(record.event)
            ids.add(record.event_id)
            if rng.random() < 0.3:
                flush()
    flush()


@cache
def histories() -> list[History]:
    """Return the histories."""
    rng = np.random.default_rng(SEED)
    return [history(rng) for _ in range(HISTORIES)]


def database(made: list[History]) -> duckdb.DuckDBPyConnection:
    """Return a database with the records as they arrived, and the spine."""
    log = [
        {
            "user_id": f"u{user}",
            "arrival": arrival,
            "timestamp_ms": record.timestamp_ms,
            "is_deletion": record.event is None,
            "event_id": record.event_id or None,
            "item": record.event.item if record.event else None,
            "action": record.event.action if record.event else None,
            "surface": record.event.surface if record.event else None,
            "duration_ms": record.event.duration_ms if record.event else None,
            "value": record.event.value if record.event else None,
        }
        for user, each in enumerate(made)
        for arrival, record in enumerate(each.records)
    ]
    spine = [{"user_id": f"u{user}", "as_of_ms": at} for user, each in enumerate(made) for at in each.as_of_ms]
    return feature_sql.connect_log(pa.Table.from_pylist(log), ITEMS, spine_table(spine))


def spine_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return a spine with the place of each row."""
    return pa.Table.from_pylist([{"place": place, **row} for place, row in enumerate(rows)])


def test_histories_are_worth_it() -> None:
    """The histories have late events, repeats, deletions, and events that each of these rules keeps out."""
    made = histories()
    records = [record for each in made for record in each.records]
    assert sum(record.event is None for record in records) > 500
    late = sum(
        any(earlier.timestamp_ms > record.timestamp_ms for earlier in each.records[:at])
        for each in made
        for at, record in enumerate(each.records)
    )
    assert late > 10_000
    assert len(records) - sum(len(each.counted) for each in made) > 5_000
    assert sum(len(each.counted) for each in made) > 5_000


def test_the_state_is_the_model_is_the_query() -> None:
    """Every feature of every history as of up to six times: counts and ids exactly, numbers to 1e-9."""
    made, rng = histories(), np.random.default_rng(SEED + 1)
    state = FeatureState(FEATURES, ATTRIBUTES, HISTORIES, load_functions())
    by_query = feature_sql.values(database(made), FEATURES)
    place = 0
    for row, each in enumerate(made):
        feed(state, row, each.records, rng)
        rows = np.full(len(each.as_of_ms), row)
        as_of = np.array(each.as_of_ms, np.int64)
        found, published = state.values(rows, as_of), [json.loads(text) for text in state.records(rows, as_of).values]
        for at, as_of_ms in enumerate(each.as_of_ms):
            by_model = feature_model.values(WHOLE, each.counted, as_of_ms, ITEMS)
            for feature in FEATURES.features:
                queried = by_query[feature.name][place]
                where = (SEED, row, as_of_ms, feature.name, by_model[feature.name])
                assert agrees(feature, found.values[feature.name][at], by_model[feature.name]), where
                assert agrees(feature, published[at][feature.name], by_model[feature.name]), where
                assert agrees(feature, found.values[feature.name][at], queried), (*where, queried)
            place += 1
    assert place > 3 * HISTORIES
