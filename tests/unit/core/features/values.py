"""Compares values with those of the model."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any


def agrees(found: Any, wanted: Any) -> bool:
    """Return whether a value is that of the model: numbers to 1e-9, anything else exactly."""
    if isinstance(wanted, float):
        return found is not None and math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(wanted, list) and wanted and isinstance(wanted[0], tuple):
        pairs = zip(found, wanted, strict=True)
        return len(found) == len(wanted) and all(f[0] == w[0] and agrees(f[1], w[1]) for f, w in pairs)
    return bool(found == wanted)


def near_tie(value: Any) -> bool:
    """Return whether a ranking of the model has two equal sums, whose order rounding may change."""
    numbers = [number for _, number in value]
    return any(math.isclose(a, b, rel_tol=1e-9) for a, b in pairwise(numbers))
