"""Random histories of a few users, over attributes whose names need care in JSON."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from encoder.actions.columns import ACTION_DTYPE, Actions, item_key, name_code
from infra.harness.feature_model import Event
from streams.core.features.attributes import Attributes
from streams.core.features.definitions import DAY_MS, HOUR_MS, parse_features
from streams.core.features.state import FeatureState
from streams.features_kernel import load_functions
from tests.unit.core.features.definitions import TOML

COLORS = ["red", "blue", '"green"\t', "чёрный"]
ITEMS = {f"item-{number}": {"color": COLORS[number % 4]} if number % 5 else {} for number in range(10)} | {
    'say "hi"\n': {"color": COLORS[2]},
    "ключ\\\x01": {"color": COLORS[3]},
}
ATTRIBUTES = Attributes.of(ITEMS)
MORE = Attributes.of({**ITEMS, "other": {"color": "amber"}})
"""One more value, which comes first, so that every code is another."""
FEATURES = parse_features(TOML, ATTRIBUTES.names)
FUNCTIONS = load_functions()
USERS = 2
START_MS = 20_000 * DAY_MS
SPANS_MS = (HOUR_MS, 2 * DAY_MS, 40 * DAY_MS)
EVENT = st.builds(
    Event,
    item=st.sampled_from(list(ITEMS)),
    action=st.sampled_from(["buy", "view"]),
    timestamp_ms=st.one_of(
        *(st.integers(START_MS + SPANS_MS[-1] - span, START_MS + SPANS_MS[-1]) for span in SPANS_MS)
    ),
    surface=st.sampled_from(["", "home", "search"]),
    duration_ms=st.integers(0, 10_000),
    value=st.one_of(st.none(), st.floats(-1e3, 1e3)),
)


def actions_of(events: list[Event]) -> Actions:
    """Return events as actions, which have no `value`."""
    actions = np.zeros(len(events), ACTION_DTYPE)
    actions["item"] = [item_key(event.item) for event in events]
    actions["action"] = [name_code(event.action) for event in events]
    actions["surface"] = [name_code(event.surface) for event in events]
    actions["timestamp_ms"] = [event.timestamp_ms for event in events]
    actions["duration_ms"] = [event.duration_ms for event in events]
    return actions


def add_events(state: FeatureState, batch: list[tuple[int, Event]]) -> None:
    """Add events, each with its user's row."""
    numbers = np.array([math.nan if event.value is None else event.value for _, event in batch], np.float64)
    state.add(np.array([row for row, _ in batch], np.int64), actions_of([event for _, event in batch]), numbers)
