"""What a definition promises, in words and as a JSON Schema; and how long a value can become. Pure."""

from __future__ import annotations

import json
from typing import Any

from streams.core.features.definitions import Feature, FeatureSet, Filter, Kind, shown
from streams.core.features.rankings import TILE_COUNT_MAX
from streams.core.features.recent import SESSIONS

NUMBER_BYTES_MAX = 24
"""Length of the longest number in JSON, such as -1.7976931348623157e+308."""
DIALECT = "https://json-schema.org/draft/2020-12/schema"
RANKED = {
    "type": "array",
    "prefixItems": [{"type": "string"}, {"type": "number"}],
    "items": False,
    "minItems": 2,
}
MEANINGS = {
    Kind.COUNT: "Number of {events}",
    Kind.SUM: "Sum of the {of}s of {events}",
    Kind.MEAN: "Mean of the {of}s of {events}",
    Kind.MIN: "Least of the {of}s of {events}",
    Kind.MAX: "Greatest of the {of}s of {events}",
    Kind.DISTINCT: "Number of different {of}s of {events}",
    Kind.LAST_K: "Items of the last {k} {events}, newest first",
    Kind.SECONDS_SINCE: "Seconds since the last of the {events}",
    Kind.SESSION_LENGTH: "Seconds from the first to the last event of the open session of {events}, {end}",
    Kind.SESSION_DEPTH: "Number of events of the open session of {events}, {end}",
    Kind.TOP_K: "The {k} values of {group} with the most {events}, each with its number",
    Kind.DECAYED_AFFINITY: "The {k} values of {group} with the greatest sums of {events}, each with its sum; an event "
    "counts half after {half_life}",
}


def json_schema(feature_set: FeatureSet) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the values that `user-features` carries for these definitions."""
    return {
        "$schema": DIALECT,
        "$id": f"urn:streamformer:feature-set:{feature_set.version}",
        "title": "Features of a user",
        "type": "object",
        "properties": {each.name: _schema(each) for each in feature_set.features},
        "required": [each.name for each in feature_set.features],
        "additionalProperties": False,
    }


def meaning(feature: Feature) -> str:
    """Return one sentence: what is computed, from which events, over which window."""
    text = MEANINGS[feature.kind].format(
        events=f"events{_filters(feature.filter)}{_window(feature)}",
        of=feature.of,
        k=feature.k,
        group=feature.group,
        end=f"which is over {shown(feature.gap_ms)} after its last event" if feature.gap_ms else "",
        half_life=shown(feature.half_life_ms) if feature.half_life_ms else "",
    )
    return f"{text}."


def exactness(feature: Feature) -> str:
    """Return what of the value is exact, and which error the rest has."""
    match feature.kind:
        case Kind.DISTINCT:
            error = 100 / feature.cap**0.5
            return (
                f"Exact while at most {feature.cap} different {feature.of}s are in the window; beyond that a theta "
                f"sketch with a relative standard error of about {error:.1f} %, larger while most of a user's ids "
                "leave the window (1/√(ids known in the window)), and named in the header `estimated`."
            )
        case Kind.TOP_K:
            return (
                f"Exact while the events in the window touch at most {feature.cap} values of {feature.group}, each at "
                f"most {TILE_COUNT_MAX:,} times in {shown(feature.hop_ms)}; beyond that the value with the least is "
                "dropped and begins at 0 when it comes again, and the feature is named in the header `estimated` until "
                "what was dropped has left the window."
            )
        case Kind.DECAYED_AFFINITY:
            return (
                f"Exact until a user has touched more than {feature.cap} values of {feature.group}; then the value "
                "with the least is dropped and begins at 0 when it comes again, and the feature is named in the header "
                "`estimated`."
            )
        case Kind.SESSION_LENGTH | Kind.SESSION_DEPTH:
            return f"Exact, unless late events join the open session to one that is older than the newest {SESSIONS}."
        case Kind.SUM | Kind.MEAN:
            return "Exact up to the rounding of a double, since numbers are added in order of arrival."
        case _:
            return "Exact."


def value_bytes_max(feature_set: FeatureSet, longest_name: dict[str, int], longest_id: int) -> int:
    """Return the length of the longest JSON object that these features can have.

    `longest_name` holds, per item attribute, the length in bytes of its longest value as JSON, quotes included, and
    `longest_id` that of the longest item id.
    """
    total = len("{}")
    for each in feature_set.features:
        total += len(each.name) + len('"":,')
        match each.kind:
            case Kind.LAST_K:
                total += len("[]") + each.k * (longest_id + len(","))
            case Kind.TOP_K | Kind.DECAYED_AFFINITY:
                total += len("[]") + each.k * (longest_name.get(each.group, 0) + NUMBER_BYTES_MAX + len("[,],"))
            case _:
                total += NUMBER_BYTES_MAX
    return total


def _schema(feature: Feature) -> dict[str, Any]:
    described: dict[str, Any] = {"description": f"{meaning(feature)} {exactness(feature)}"}
    match feature.kind:
        case Kind.COUNT | Kind.DISTINCT | Kind.SESSION_DEPTH:
            return described | {"type": "integer", "minimum": 0}
        case Kind.SESSION_LENGTH:
            return described | {"type": "number", "minimum": 0}
        case Kind.LAST_K:
            return described | {"type": "array", "items": {"type": "string"}, "maxItems": feature.k}
        case Kind.TOP_K | Kind.DECAYED_AFFINITY:
            return described | {"type": "array", "items": RANKED, "maxItems": feature.k}
        case Kind.SECONDS_SINCE:
            return described | {"type": ["number", "null"], "minimum": 0}
        case _:
            return described | {"type": ["number", "null"]}


def _filters(chosen: Filter) -> str:
    """Return the filters as words, empty if every event counts."""
    parts = [("action", chosen.actions), ("surface", chosen.surfaces), *chosen.where]
    texts = [
        f"{name} {' or '.join(json.dumps(value, ensure_ascii=False) for value in values)}"
        for name, values in parts
        if values
    ]
    return f" with {' and '.join(texts)}" if texts else ""


def _window(feature: Feature) -> str:
    if not feature.window_ms:
        return ""
    return f" in the last {shown(feature.window_ms)}, from a boundary of {shown(feature.hop_ms)} in UTC"
