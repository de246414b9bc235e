"""The log of tldr-pages contributors, with values and durations made from other columns, and attributes of its items.

The log is in the folder `shared` beside the checkout; tests that need it are skipped without it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from encoder.data.log import LogColumns

LOG = Path(__file__).parents[3].parent / "shared" / "data" / "tldr_pages_actions" / "actions.csv.gz"
COLUMNS = LogColumns(surface="surface", duration_ms="duration_ms", value="value")
MISSING = "the folder `shared` with the log is not beside the checkout"


@cache
def actions() -> pa.Table:
    """Return the log with all columns that definitions can use."""
    raw = pa.csv.read_csv(LOG)
    many = raw["items_in_commit"].to_numpy()
    lengths = np.array([len(item) for item in raw["item_id"].to_pylist()])
    return pa.table(
        {
            "user_id": raw["user_id"],
            "item_id": raw["item_id"],
            "action": raw["action"],
            "timestamp_ms": raw["timestamp"].to_numpy() * 1_000,
            "surface": raw["language"],
            "duration_ms": np.where(lengths % 3 == 0, 0, lengths * 100 + many),
            "value": pa.array(many / 7, mask=many > 50),
        }
    )


@cache
def items() -> dict[str, dict[str, str]]:
    """Return attributes of the items: few platforms, and many beginnings of names."""
    found = sorted(set(actions()["item_id"].to_pylist()))
    parts = {item: item.partition("/") for item in found}
    return {item: {"platform": first, "letters": last[:2] or "-"} for item, (first, _, last) in parts.items()}
