"""Twenty definitions: every kind at least once, over 1 hour, 1 day, 7 days and 28 days."""

import tomllib
from typing import Any

TOML = """
[[feature]]
name = "acts_1h"
kind = "count"
window = "1h"
[[feature]]
name = "acts_1d"
kind = "count"
window = "1d"
[[feature]]
name = "acts_7d"
kind = "count"
window = "7d"
[[feature]]
name = "merges_28d"
kind = "count"
actions = ["merged_create", "merged_edit", "merged_translate"]
window = "28d"
[[feature]]
name = "time_1d"
kind = "sum"
of = "duration"
window = "1d"
[[feature]]
name = "value_28d"
kind = "sum"
of = "value"
window = "28d"
surfaces = ["de", "es", "pt_BR", "zh"]
[[feature]]
name = "mean_7d"
kind = "mean"
of = "value"
window = "7d"
[[feature]]
name = "least_1h"
kind = "min"
of = "value"
window = "1h"
[[feature]]
name = "most_28d"
kind = "max"
of = "duration"
window = "28d"
where = { platform = ["linux", "common"] }
[[feature]]
name = "items_28d"
kind = "distinct"
of = "item"
window = "28d"
[[feature]]
name = "items_1d"
kind = "distinct"
of = "item"
cap = 16
window = "1d"
[[feature]]
name = "surfaces_7d"
kind = "distinct"
of = "surface"
window = "7d"
[[feature]]
name = "last_5"
kind = "last_k"
k = 5
[[feature]]
name = "last_merged"
kind = "last_k"
k = 3
actions = ["merged_create", "merged_edit"]
where = { platform = ["linux", "osx", "windows"] }
[[feature]]
name = "since_merge"
kind = "seconds_since"
actions = ["merged_create", "merged_edit", "merged_translate"]
[[feature]]
name = "session_s"
kind = "session_length"
gap = "30m"
[[feature]]
name = "session_events"
kind = "session_depth"
gap = "1d"
surfaces = ["en"]
[[feature]]
name = "platforms_7d"
kind = "top_k"
group = "platform"
window = "7d"
k = 3
[[feature]]
name = "letters_28d"
kind = "top_k"
group = "letters"
window = "28d"
cap = 32
k = 5
[[feature]]
name = "affinity"
kind = "decayed_affinity"
group = "platform"
half_life = "7d"
k = 3
"""
TABLES: list[dict[str, Any]] = tomllib.loads(TOML)["feature"]
WHOLE = [{**table, "k": 10_000} if "group" in table else table for table in TABLES]
"""The same with whole rankings, for the model."""
