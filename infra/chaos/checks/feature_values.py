"""Compare the values of one user's features with those of the model.

Counts, ids and times must be equal, other numbers to 1e-9. Two kinds of values leave room: an estimate of `distinct`
must be near the count, and may be one only if the user ever had more ids than are kept; and of two values of an
attribute whose decayed sums are equal but for rounding, either may come first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from infra.harness.feature_files import FeatureRules
from infra.harness.feature_model import Event, values

CLOSE = 1e-9
CAP = 64
"""Ids that `distinct` keeps of a user, unless the definition has another limit."""
ESTIMATE = 0.75
"""Greatest relative error of an estimate: six standard errors of 64 ids."""
ALL = 1 << 20
MOVING = frozenset({"seconds_since", "decayed_affinity", "session_length"})
"""Kinds whose values change with every millisecond, or may."""


def difference(
    rules: FeatureRules, events: Sequence[Event], as_of_ms: int, found: Mapping[str, Any], estimated: Sequence[str]
) -> str:
    """Describe the first value that is not the model's; empty if there is none."""
    tables = [{**table, "k": ALL} if "group" in table else table for table in rules.tables]
    must = values(tables, events, as_of_ms, rules.attributes)
    if found.keys() != must.keys():
        return f"features {sorted(found.keys() ^ must.keys())} are missing or foreign"
    for table in rules.tables:
        name = table["name"]
        if name in estimated:
            problem = _estimate(table, events, found[name], must[name])
        elif "group" in table:
            problem = _ranking(table, found[name], must[name])
        else:
            problem = "" if is_close(found[name], must[name]) else f"{found[name]}, must be {must[name]}"
        if problem:
            return f"{name} is {problem}"
    return ""


def is_close(found: Any, must: Any) -> bool:
    """Return whether a value is the model's: numbers with a fraction to 1e-9, everything else exactly."""
    if isinstance(found, float) and isinstance(must, int | float):  # of nothing the model's sum is 0, not 0.0
        return math.isclose(found, must, rel_tol=CLOSE, abs_tol=CLOSE)
    return type(found) is type(must) and bool(found == must)


def is_steady(
    rules: FeatureRules, events: Sequence[Event], as_of_ms: int, until_ms: int, estimated: Collection[str] = ()
) -> str:
    """Describe the first value of the model that changes before a time; empty if none does.

    Estimates are left out: the ids that the worker does not keep leave the window unseen.
    """
    tables = [table for table in rules.tables if table["kind"] not in MOVING and table["name"] not in estimated]
    now = values(tables, events, as_of_ms, rules.attributes)
    then = values(tables, events, until_ms - 1, rules.attributes)
    name = next((name for name in now if not is_close(then[name], now[name])), "")
    return name and f"{name} changes from {now[name]} to {then[name]} before valid-until-ms {until_ms}"


def _estimate(table: Mapping[str, Any], events: Sequence[Event], found: Any, must: int) -> str:
    ids = {each.item if table["of"] == "item" else each.surface for each in events}
    if len(ids) <= table.get("cap", CAP):
        return f"an estimate, {found}, although the user has {len(ids)} ids"
    is_near = isinstance(found, int) and abs(found - must) <= ESTIMATE * must
    return "" if is_near else f"estimated as {found}, and is {must}"


def _ranking(table: Mapping[str, Any], found: Any, must: Sequence[tuple[str, float]]) -> str:
    """Compare with the whole ranking: the numbers in order, and the number of each name."""
    names, wanted = dict(must), must[: table["k"]]
    if table["kind"] == "top_k":
        return "" if found == [list(pair) for pair in wanted] else f"{found}, must be {wanted}"
    is_right = len(found) == len(wanted) and all(
        math.isclose(number, best, rel_tol=CLOSE, abs_tol=1e-300)
        and math.isclose(number, names.get(name, -1.0), rel_tol=CLOSE, abs_tol=1e-300)
        for (name, number), (_, best) in zip(found, wanted, strict=True)
    )
    return "" if is_right else f"{found}, must be {wanted}"
