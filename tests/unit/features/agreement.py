"""When values from two sources are equal: counts and ids exactly, numbers to 1e-9, near ties in either order."""

from __future__ import annotations

import math
from typing import Any

from streams.core.features.definitions import Feature, Kind

RANKINGS = (Kind.TOP_K, Kind.DECAYED_AFFINITY)


def is_near(found: Any, wanted: Any) -> bool:
    """Return whether two numbers are equal to 1e-9, or both are None."""
    if found is None or wanted is None:
        return found is wanted
    return math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-9)


def agrees(feature: Feature, found: Any, wanted: Any) -> bool:
    """Return whether `found` is the value `wanted`; of a ranking `wanted` holds every name, greatest first."""
    if feature.kind in RANKINGS:
        return _same_ranking(feature, found, [(name, float(total)) for name, total in wanted])
    if isinstance(wanted, float) or wanted is None:
        return is_near(found, wanted)
    return bool(found == wanted)


def _same_ranking(feature: Feature, found: Any, wanted: list[tuple[str, float]]) -> bool:
    first = wanted[: feature.k]
    if feature.kind is Kind.TOP_K:
        return [tuple(pair) for pair in found] == first
    totals = dict(wanted)
    return (
        len(found) == len(first)
        and len({name for name, _ in found}) == len(found)
        and all(name in totals and is_near(number, totals[name]) for name, number in found)
        and all(is_near(pair[1], total) for pair, (_, total) in zip(found, first, strict=True))
    )
