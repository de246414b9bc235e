"""A log that can be learned: most actions of a user are on the item that follows the previous one on a circle."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from encoder.data.log import ActionLog, LogColumns, log_from_table
from encoder.training.recipe import Recipe, parse_recipe

MINUTE_MS = 60_000
START_MS = 1_700_000_000_000


def walks(seed: int, *, users: int = 40, items: int = 30, length: int = 40, follows: float = 0.9) -> ActionLog:
    """Return walks on a circle of items: a user takes the next item with probability `follows`, else jumps."""
    return log_from_table(walks_table(seed, users=users, items=items, length=length, follows=follows), LogColumns())


def walks_table(seed: int, *, users: int, items: int, length: int, follows: float) -> pa.Table:
    """Return the walks as a table, ordered by time, with users interleaved."""
    rng = np.random.default_rng(seed)
    jumps = np.where(rng.random((users, length)) < follows, 1, rng.integers(2, items, (users, length)))
    item = (np.cumsum(jumps, axis=1) + rng.integers(0, items, (users, 1))) % items
    time_ms = START_MS + np.cumsum(rng.integers(1, 600, (users, length)), axis=1) * MINUTE_MS
    order = np.argsort(time_ms, axis=None, kind="stable")
    return pa.table(
        {
            "user_id": [f"u{row // length}" for row in order],
            "item_id": [f"i{value}" for value in item.ravel()[order]],
            "action": ["view"] * len(order),
            "timestamp_ms": time_ms.ravel()[order],
        }
    )


def small_recipe(**changes: dict[str, object]) -> Recipe:
    """Return a recipe of the smallest encoder that learns a circle; `changes` override keys of its tables."""
    tables: dict[str, dict[str, object]] = {
        "encoder": {
            "d_model": 32,
            "heads": 4,
            "kv_heads": 2,
            "windows": [8, 8],
            "sequence_length": 20,
            "embedding_dim": 32,
            "item_dim": 32,
            "item_tower": "identity",
            "normalize_items": False,
        },
        "data": {"items_min": 1, "chunk": 20, "batch_tokens": 400, "hide_seen": False},
        "split": {"kind": "time"},
        "optimizer": {"lr": 1e-2, "dropout": 0.0, "warmup_steps": 5},
        "budget": {"tokens_max": 15_000, "validate_tokens": 5_000},
    }
    merged = {name: {**tables.get(name, {}), **changes.get(name, {})} for name in {*tables, *changes}}
    return parse_recipe({**merged, "precision": "fp32"})
