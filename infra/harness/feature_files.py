"""Feature definitions and item attributes of a run: every kind of feature, and windows that end during the run.

The rules of a run are read from the files by themselves, so a checker shares no reader with the worker. Only the
version of the feature set is the worker's.
"""

from __future__ import annotations

import csv
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.harness.releases import ITEMS
from streams.config.settings import Settings
from streams.features import read_definitions

CATEGORIES = ("bags", "books", "games", "hats", "lamps", "shoes", "toys")
UNKNOWN_EVERY = 50
"""One item in so many has no category."""
DEFINITIONS = """
[[feature]]
name = "clicks_5m"
kind = "count"
actions = ["click"]
window = "5m"

[[feature]]
name = "actions_1d"
kind = "count"
window = "1d"

[[feature]]
name = "spent_7d"
kind = "sum"
of = "value"
window = "7d"

[[feature]]
name = "price_1h"
kind = "mean"
of = "value"
surfaces = ["home"]
window = "1h"

[[feature]]
name = "cheapest_1d"
kind = "min"
of = "value"
window = "1d"

[[feature]]
name = "longest_4d"
kind = "max"
of = "duration"
window = "4d"

[[feature]]
name = "items_5m"
kind = "distinct"
of = "item"
window = "5m"

[[feature]]
name = "surfaces_28d"
kind = "distinct"
of = "surface"
window = "28d"

[[feature]]
name = "latest"
kind = "last_k"
k = 5

[[feature]]
name = "since_shoes"
kind = "seconds_since"
where = { category = ["shoes", "hats"] }

[[feature]]
name = "session_s"
kind = "session_length"
gap = "30m"

[[feature]]
name = "session_actions"
kind = "session_depth"
actions = ["click", "save"]
gap = "10m"

[[feature]]
name = "categories_3d"
kind = "top_k"
group = "category"
window = "3d"
k = 3

[[feature]]
name = "affinity"
kind = "decayed_affinity"
group = "category"
half_life = "6h"
k = 4
"""
REFRESH_EVERY_MS = 5_000


@dataclass(frozen=True, slots=True)
class FeatureRules:
    """What the features of a run must be."""

    tables: Sequence[Mapping[str, Any]]
    """Definitions, as TOML has them."""
    attributes: Mapping[str, Mapping[str, str]]
    """Value by attribute, by item."""
    feature_set: str
    """Version that records carry."""


def write_features(folder: Path) -> dict[str, Any]:
    """Write definitions and attributes of the items of a run; return the settings that name them."""
    definitions, attributes = folder / "features.toml", folder / "items.csv"
    definitions.write_text(DEFINITIONS)
    rows = [f"item-{number},{_category(number)}" for number in range(ITEMS)]
    attributes.write_text("\n".join(["item_id,category", *rows]) + "\n")
    return {
        "definitions_file": str(definitions),
        "attributes_file": str(attributes),
        "refresh": "always",
        "refresh_every_ms": REFRESH_EVERY_MS,
    }


def _category(number: int) -> str:
    return "" if number % UNKNOWN_EVERY == 0 else CATEGORIES[number * number % len(CATEGORIES)]


def feature_rules(settings: Settings) -> FeatureRules | None:
    """Return what the features of these settings must be, None where there are none."""
    chosen = settings.features
    if chosen.definitions_file is None:
        return None
    feature_set, _ = read_definitions(chosen.definitions_file, chosen.attributes_file)
    tables = tomllib.loads(chosen.definitions_file.read_text())["feature"]
    attributes = _attributes(chosen.attributes_file) if chosen.attributes_file else {}
    return FeatureRules(tables, attributes, feature_set.version)


def _attributes(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {
            row["item_id"]: {name: value for name, value in row.items() if name != "item_id" and value}
            for row in csv.DictReader(file)
        }
