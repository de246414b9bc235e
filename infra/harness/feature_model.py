"""The model of streaming features: their values from a plain list of events, as the definitions state them.

Independent of the worker, and slow: it keeps every event, and reads the TOML of the definitions by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MS = {"s": 1_000, "m": 60_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
Values = dict[str, Any]
Attributes = Mapping[str, Mapping[str, str]]
"""Value by attribute, by item."""


@dataclass(frozen=True, slots=True)
class Event:
    """An event of one user; `arrival` orders events of one time."""

    item: str
    action: str
    timestamp_ms: int
    surface: str = ""
    duration_ms: int = 0
    value: float | None = None
    arrival: int = 0


def values(
    tables: Sequence[Mapping[str, Any]], events: Sequence[Event], as_of_ms: int, attributes: Attributes
) -> Values:
    """Return the value of each feature, given as its TOML table, over the user's events before `as_of_ms`."""
    before = sorted(
        (each for each in events if each.timestamp_ms < as_of_ms), key=lambda e: (e.timestamp_ms, e.arrival)
    )
    return {
        table["name"]: _value(table, list(_matching(table, before, attributes)), as_of_ms, attributes)
        for table in tables
    }


def _ms(duration: str) -> int:
    digits = duration.rstrip("abcdefghijklmnopqrstuvwxyz")
    return int(digits) * MS[duration[len(digits) :]]


def _matching(table: Mapping[str, Any], events: Sequence[Event], attributes: Attributes) -> Iterator[Event]:
    """Yield the events that pass the filters; those before the window are left out by `_value`."""
    for each in events:
        known = attributes.get(each.item, {})
        if "actions" in table and each.action not in table["actions"]:
            continue
        if "surfaces" in table and each.surface not in table["surfaces"]:
            continue
        if all(known.get(name) in wanted for name, wanted in table.get("where", {}).items()):
            yield each


def _begin_ms(window: str, as_of_ms: int) -> int:
    """Return where the window begins: at a boundary of 5 minutes, an hour or a day, by its length."""
    length = _ms(window)
    hop = MS["m"] * 5 if length <= 12 * MS["h"] else MS["h"] if length <= 4 * MS["d"] else MS["d"]
    return (as_of_ms - length) // hop * hop


def _value(table: Mapping[str, Any], events: list[Event], as_of_ms: int, attributes: Attributes) -> Any:
    kind = table["kind"]
    if "window" in table:
        begin_ms = _begin_ms(table["window"], as_of_ms)
        events = [each for each in events if each.timestamp_ms >= begin_ms]
    if kind == "count":
        return len(events)
    if kind in ("sum", "mean", "min", "max"):
        return _aggregate(kind, table["of"], events)
    if kind == "distinct":
        return len({each.item if table["of"] == "item" else each.surface for each in events} - {""})
    if kind == "last_k":
        return [each.item for each in events[::-1][: table["k"]]]
    if kind == "seconds_since":
        return (as_of_ms - events[-1].timestamp_ms) / 1_000 if events else None
    if kind in ("session_length", "session_depth"):
        session = _session(events, _ms(table["gap"]), as_of_ms)
        if kind == "session_depth":
            return len(session)
        return (session[-1].timestamp_ms - session[0].timestamp_ms) / 1_000 if session else 0.0
    return _ranking(table, events, as_of_ms, attributes)


def _aggregate(kind: str, of: str, events: list[Event]) -> float | None:
    """Return the aggregate of the events that have the number; an unknown duration is 0 and does not count."""
    if of == "duration":
        numbers = [float(each.duration_ms) for each in events if each.duration_ms]
    else:
        numbers = [each.value for each in events if each.value is not None]
    if kind == "sum":
        return sum(numbers)
    if not numbers:
        return None
    return {"mean": sum(numbers) / len(numbers), "min": min(numbers), "max": max(numbers)}[kind]


def _session(events: list[Event], gap_ms: int, as_of_ms: int) -> list[Event]:
    """Return the events of the session that is open; none if the last event is longer ago than the gap."""
    if not events or as_of_ms - events[-1].timestamp_ms > gap_ms:
        return []
    first = len(events) - 1
    while first and events[first].timestamp_ms - events[first - 1].timestamp_ms <= gap_ms:
        first -= 1
    return events[first:]


def _ranking(
    table: Mapping[str, Any], events: list[Event], as_of_ms: int, attributes: Attributes
) -> list[tuple[str, float]]:
    """Return the first k values of the attribute with their counts or decayed sums; ties in order of the names."""
    totals: defaultdict[str, float] = defaultdict(float)
    for each in events:
        name = attributes.get(each.item, {}).get(table["group"])
        if name is not None:
            is_decayed = table["kind"] == "decayed_affinity"
            age = (as_of_ms - each.timestamp_ms) / _ms(table["half_life"]) if is_decayed else 0
            totals[name] += 2.0**-age
    return sorted(totals.items(), key=lambda pair: (-pair[1], pair[0]))[: table["k"]]
