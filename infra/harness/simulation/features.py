"""The features of a simulation, and what they must be: computed from a user's events, as plainly as possible.

This is a model of its own. It shares nothing with `infra.harness.feature_model`, nor with the product.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from infra.harness.simulation.broker import Record
from infra.harness.simulation.model import Event
from streams.core.features.attributes import Attributes
from streams.core.features.definitions import parse_features
from streams.core.features.partition import FeatureConfig, RefreshPolicy
from streams.features_kernel import load_functions

DEFINITIONS = """
[[feature]]
name = "recent"
kind = "count"
window = "1h"

[[feature]]
name = "spent"
kind = "sum"
of = "value"
window = "1d"

[[feature]]
name = "latest"
kind = "last_k"
k = 3

[[feature]]
name = "since_buy"
kind = "seconds_since"
actions = ["buy"]

[[feature]]
name = "session"
kind = "session_depth"
gap = "12s"
"""
ITEMS_MAX = 1_000
MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
GAP_MS = 12_000
"""Longer than the clock of the workers is ahead, so that sessions are open at first."""


@dataclass(frozen=True)
class FeatureOutput:
    """A record of the features topic; a tombstone has no values."""

    user: bytes
    offset: int
    as_of_ms: int
    values: dict[str, Any] | None
    completeness: str


@cache
def feature_config(refresh_ms: int) -> FeatureConfig:
    """Return what the workers compute; users are published again at most every `refresh_ms`, and never for 0."""
    attributes = Attributes.of({f"i{number}": {} for number in range(ITEMS_MAX)})
    refresh = RefreshPolicy(enabled=refresh_ms > 0, every_min_ms=refresh_ms)
    return FeatureConfig(parse_features(DEFINITIONS), attributes, load_functions(), refresh)


def expected(events: Sequence[Event], as_of_ms: int) -> dict[str, Any]:
    """Return the features of the events that happened before a time; they come in order of arrival."""
    events = sorted((each for each in events if each.timestamp_ms < as_of_ms), key=lambda each: each.timestamp_ms)
    hour, day = (
        (as_of_ms - HOUR_MS) // (5 * MINUTE_MS) * 5 * MINUTE_MS,
        (as_of_ms - 24 * HOUR_MS) // HOUR_MS * HOUR_MS,
    )
    bought = [each.timestamp_ms for each in events if each.strong]
    return {
        "recent": sum(each.timestamp_ms >= hour for each in events),
        "spent": sum(each.value or 0.0 for each in events if each.timestamp_ms >= day),
        "latest": [each.name for each in reversed(events[-3:])],
        "since_buy": (as_of_ms - bought[-1]) / 1_000 if bought else None,
        "session": _session([each.timestamp_ms for each in events], as_of_ms),
    }


def _session(times_ms: Sequence[int], as_of_ms: int) -> int:
    depth, later_ms = 0, as_of_ms
    for time_ms in reversed(times_ms):
        if later_ms - time_ms > GAP_MS:
            break
        depth, later_ms = depth + 1, time_ms
    return depth


def features_of(record: Record) -> FeatureOutput:
    """Return the content of a record of the features topic."""
    headers = {name: value.decode() for name, value in record.headers}
    assert record.key is not None
    offset, as_of_ms = int(headers["source-offset"]), int(headers.get("as-of-ms", "0"))
    values = None if record.value is None else json.loads(record.value)
    return FeatureOutput(record.key, offset, as_of_ms, values, headers.get("completeness", "{}"))
