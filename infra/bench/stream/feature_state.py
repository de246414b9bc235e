"""Features without a worker: bytes of a user's stored state, and rows per second of `features compute`."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from encoder.data.log import LogColumns
from infra.bench.stream.bursts import ACTIONS, ITEMS
from infra.bench.stream.feature_job import actions_of, history
from infra.features.definitions import load_definitions
from infra.features.offline import Job, compute_features
from infra.features.spine import read_spine
from streams.core.features.state import FeatureState
from streams.core.layout import NEVER, StoredFeatures
from streams.features_kernel import load_functions
from streams.storage.features import encode_one

EVENTS_PER_DAY = 12
"""Events of a user on an active day, whose mean `infra.bench.stream.feature_job.history` takes."""
BATCH = 1_000


def state_bytes(definitions: Path, attributes: Path, users: int) -> float:
    """Return the 99th percentile of the stored bytes of users with 1 to 90 active days."""
    feature_set, known = load_definitions(definitions, attributes)
    rng = np.random.default_rng(0)
    rows, times_ms = history(rng, users, EVENTS_PER_DAY, _now_ms())
    actions, prices = actions_of(rng, times_ms), rng.integers(500, size=len(rows)).astype(np.float64) + 0.99
    state = FeatureState(feature_set, known, users, load_functions())
    for low in range(0, len(rows), BATCH):
        batch = slice(low, low + BATCH)
        state.add(rows[batch], actions[batch], prices[batch])
    counts = np.bincount(rows, minlength=users).tolist()
    stored = [
        encode_one(b"", StoredFeatures(count, 0, NEVER, False, packed))
        for count, packed in zip(counts, state.pack(np.arange(users)), strict=True)
    ]
    return float(np.percentile([len(each) for each in stored], 99))


def offline_rates(definitions: Path, attributes: Path, folder: Path, users: int) -> tuple[float, float]:
    """Return rows and actions per second of `features compute`: a row for every fourth action, just after it."""
    log, spine = folder / "log.parquet", folder / "spine.parquet"
    rng = np.random.default_rng(0)
    user, times_ms = history(rng, users, EVENTS_PER_DAY, _now_ms())
    names = pa.array([f"user-{number}" for number in range(users)]).take(pa.array(user))
    columns = {
        "user_id": names,
        "item_id": pa.array([f"item-{number}" for number in rng.integers(ITEMS, size=len(user)).tolist()]),
        "action": pa.array(ACTIONS).take(pa.array(rng.integers(len(ACTIONS), size=len(user)))),
        "surface": pa.repeat("home", len(user)),
        "timestamp_ms": pa.array(times_ms),
        "duration_ms": pa.array(rng.integers(60_000, size=len(user))),
        "value": pa.array(rng.integers(500, size=len(user)) + 0.99),
    }
    pyarrow.parquet.write_table(pa.table(columns), log)
    asked = np.arange(0, len(user), 4)
    table = pa.table({"user_id": names.take(pa.array(asked)), "as_of_ms": pa.array(times_ms[asked] + 1)})
    pyarrow.parquet.write_table(table, spine)
    feature_set, known = load_definitions(definitions, attributes)
    log_columns = LogColumns(surface="surface", duration_ms="duration_ms", value="value")
    job = Job(feature_set, known, log, log_columns, read_spine(spine), folder / "out.parquet")
    summary = compute_features(job)
    return summary.rows / summary.seconds, summary.events / summary.seconds


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
