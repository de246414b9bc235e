"""The job of the feature benchmark: 20 definitions of every kind, item attributes, and users with a history.

Shapes: U users, E events.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from encoder.actions.columns import ACTION_DTYPE, Actions, item_key, name_code
from encoder.arrays import I64
from infra.bench.stream.bursts import ACTIONS, ITEMS
from streams.core.features.definitions import DAY_MS, HOUR_MS

DAYS = 90
CATEGORIES = tuple(f"category-{number}" for number in range(20))
SESSION_MS = 2 * HOUR_MS

_ACTIONS = f"actions = {list(ACTIONS)}\n"
_SURFACES = 'surfaces = ["home"]\n'
_ITEMS = f"where = {{ category = {list(CATEGORIES)} }}\n"
_FEATURES: tuple[tuple[str, str, str], ...] = (
    ("events_1h", "count", 'window = "1h"\n'),
    ("events_1d", "count", 'window = "1d"\n' + _ACTIONS),
    ("events_7d", "count", 'window = "7d"\n' + _SURFACES),
    ("events_28d", "count", 'window = "28d"\n' + _ITEMS),
    ("duration_1h", "sum", 'of = "duration"\nwindow = "1h"\n' + _ACTIONS),
    ("duration_1d", "sum", 'of = "duration"\nwindow = "1d"\n'),
    ("longest_1d", "max", 'of = "duration"\nwindow = "1d"\n' + _SURFACES),
    ("spent_7d", "sum", 'of = "value"\nwindow = "7d"\n' + _ITEMS),
    ("price_1d", "mean", 'of = "value"\nwindow = "1d"\n'),
    ("price_28d", "mean", 'of = "value"\nwindow = "28d"\n' + _ACTIONS + _SURFACES),
    ("least_7d", "min", 'of = "value"\nwindow = "7d"\n' + _ACTIONS),
    ("greatest_28d", "max", 'of = "value"\nwindow = "28d"\n' + _ITEMS),
    ("items_7d", "distinct", 'of = "item"\nwindow = "7d"\n'),
    ("surfaces_28d", "distinct", 'of = "surface"\nwindow = "28d"\n' + _ACTIONS),
    ("seen_last", "last_k", "k = 10\n" + _ACTIONS),
    ("since", "seconds_since", _SURFACES),
    ("session_length", "session_length", 'gap = "30m"\n'),
    ("session_depth", "session_depth", 'gap = "30m"\n'),
    ("top_28d", "top_k", 'group = "category"\nk = 5\nwindow = "28d"\n'),
    ("affinity", "decayed_affinity", 'group = "category"\nk = 5\nhalf_life = "7d"\n' + _ACTIONS),
)


def _toml(features: tuple[tuple[str, str, str], ...]) -> str:
    return "\n".join(f'[[feature]]\nname = "{name}"\nkind = "{kind}"\n{keys}' for name, kind, keys in features)


DEFINITIONS = _toml(_FEATURES)
"""20 features of every kind over 1 h, 1 d, 7 d and 28 d, in TOML; every event passes every filter."""
SUBSET = _toml(
    tuple(
        (f"{kind}_{window}", kind, f'window = "{window}"\n' + ('of = "duration"\n' if kind == "sum" else ""))
        for kind in ("count", "sum")
        for window in ("1h", "1d")
    )
)
"""The features that the baselines express too."""


def write_attributes(path: Path) -> Path:
    """Write the category of every item that the events name."""
    rows = (f"item-{number},{CATEGORIES[number % len(CATEGORIES)]}\n" for number in range(ITEMS))
    path.write_text("item_id,category\n" + "".join(rows))
    return path


def history(rng: np.random.Generator, users: int, events_per_day: float, now_ms: int) -> tuple[I64, I64]:
    """Return the user and the time of events [E] of the last 90 days, in order of time.

    A user acts on 1 to 90 of these days, within two hours of a day, `events_per_day` times on average.
    """
    active_days = rng.integers(1, DAYS + 1, size=users)
    is_active = rng.random((users, DAYS)).argsort(axis=1) < active_days[:, None]  # [U, DAYS]
    user, day = np.nonzero(is_active)
    events = 1 + rng.poisson(events_per_day - 1, size=len(user))
    user, day = np.repeat(user, events), np.repeat(day, events)
    times_ms = now_ms - HOUR_MS - SESSION_MS - day * DAY_MS + rng.integers(SESSION_MS, size=len(user))
    order = np.argsort(times_ms, kind="stable")
    return user[order], times_ms[order].astype(np.int64)


def actions_of(rng: np.random.Generator, times_ms: I64) -> Actions:
    """Return actions [E] at these times, with the items and durations of a burst."""
    actions = np.zeros(len(times_ms), ACTION_DTYPE)
    keys = np.array([item_key(f"item-{number}") for number in range(ITEMS)], np.uint64)
    actions["item"] = keys[rng.integers(ITEMS, size=len(times_ms))]
    actions["action"] = np.array([name_code(name) for name in ACTIONS])[rng.integers(len(ACTIONS), size=len(times_ms))]
    actions["surface"], actions["timestamp_ms"] = name_code("home"), times_ms
    actions["duration_ms"] = rng.integers(60_000, size=len(times_ms))
    return actions
