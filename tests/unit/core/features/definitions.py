"""One feature of every kind, and windows of every hop."""

TOML = """
[[feature]]
name = "views"
kind = "count"
actions = ["view"]
window = "1h"
[[feature]]
name = "watched"
kind = "sum"
of = "duration"
window = "7d"
[[feature]]
name = "price"
kind = "mean"
of = "value"
window = "28d"
where = { color = ["red", "blue"] }
[[feature]]
name = "least"
kind = "min"
of = "value"
window = "1d"
[[feature]]
name = "longest"
kind = "max"
of = "duration"
window = "3d"
actions = ["view"]
[[feature]]
name = "items"
kind = "distinct"
of = "item"
window = "7d"
[[feature]]
name = "surfaces"
kind = "distinct"
of = "surface"
window = "1h"
[[feature]]
name = "last"
kind = "last_k"
k = 3
[[feature]]
name = "last_home"
kind = "last_k"
k = 2
surfaces = ["home"]
[[feature]]
name = "since"
kind = "seconds_since"
actions = ["buy"]
[[feature]]
name = "length"
kind = "session_length"
gap = "30m"
[[feature]]
name = "depth"
kind = "session_depth"
gap = "30m"
[[feature]]
name = "top"
kind = "top_k"
group = "color"
window = "28d"
k = 2
[[feature]]
name = "affinity"
kind = "decayed_affinity"
group = "color"
half_life = "3d"
k = 2
"""
