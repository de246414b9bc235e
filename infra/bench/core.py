"""`python -m infra.bench.core`: the cost of the stream core, without a broker and without decoding.

- microseconds per event for batches of 2,000 events: skewed over 20,000 users in memory, all distinct users, and all
  distinct users that must be read from RocksDB first;
- microseconds per changed user for snapshot and codec, and per record for RocksDB;
- changelog bytes per event, keys and values, by chunk length: 150,000 events of 20,000 users between two checkpoints.

Times are CPU time of the one thread. Users are drawn as 20,000 r³, r uniform: the busiest tenth causes 46 % of the
events.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from encoder.actions.columns import ACTION_DTYPE, ActionBatch
from encoder.arrays import I64
from infra.harness.reporting import Spread, machine, print_result, print_table, run_command
from streams.core.layout import StateLimits, nothing_stored
from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.storage.codec import encode
from streams.storage.reader import read_users
from streams.storage.store import PartitionStore

USERS, BATCH, CHECKPOINT_EVENTS = 20_000, 2_000, 150_000
BEGIN_MS = 1_700_000_000_000


def bench(runs: Annotated[int, typer.Option(min=1, help="Repetitions; figures are medians.")] = 5) -> None:
    """Measure the stream core by itself."""
    rounds = [measure(seed) for seed in range(runs)]
    spreads = {name: Spread(tuple(each[name] for each in rounds)) for name in rounds[0]}
    chunk_bytes = {length: changelog_bytes(length) for length in (8, 16, 32)}
    print_table("stream core", ["figure", "median (range)"], [[name, str(spread)] for name, spread in spreads.items()])
    rows = [[str(length), *(f"{figure:.1f}" for figure in figures)] for length, figures in chunk_bytes.items()]
    print_table("changelog bytes per event, by chunk length", ["C", "first", "second", "third checkpoint"], rows)
    print_result(
        {"bench": "core", "machine": machine()}
        | {name: round(spread.median, 3) for name, spread in spreads.items()}
        | {"changelog_bytes_per_event": {length: round(figures[-1], 1) for length, figures in chunk_bytes.items()}}
    )


def measure(seed: int) -> dict[str, float]:
    """Return all times of one round, in microseconds."""
    rng = np.random.default_rng(seed)
    limits = StateLimits()
    state = _warm_state(limits, rng)
    skewed = _time_batches(state, [_batch(_skewed(rng), rng, offset) for offset in _offsets(40, 10**6)])
    distinct = _time_batches(state, [_batch(_distinct(rng), rng, offset) for offset in _offsets(40, 10**7)])
    with tempfile.TemporaryDirectory() as folder:
        store = PartitionStore.open(Path(folder) / "store")
        began = time.thread_time()
        snapshot = state.begin_checkpoint()
        records = encode(snapshot, limits)
        encoded = time.thread_time()
        store.write(records, 0)
        written = time.thread_time()
        state.commit_checkpoint(snapshot)
        store.flush()
        cold = _time_cold(store, [_batch(_distinct(rng), rng, offset) for offset in _offsets(8, 10**8)], limits)
        store.close()
    return {
        "skewed_us_per_event": skewed,
        "distinct_us_per_event": distinct,
        "cold_us_per_event": cold,
        "encode_us_per_user": (encoded - began) / len(snapshot) * 1e6,
        "store_us_per_record": (written - encoded) / len(records) * 1e6,
    }


def changelog_bytes(chunk_length: int) -> list[float]:
    """Return bytes of keys and values per event, for three checkpoints in a row."""
    limits, rng = StateLimits(chunk_length=chunk_length), np.random.default_rng(7)
    state = PartitionState(TriggerPolicy(), limits)
    state.load(_names(np.arange(USERS)), nothing_stored(USERS, limits))
    figures = []
    for checkpoint in range(3):
        for offset in _offsets(CHECKPOINT_EVENTS // BATCH, checkpoint * CHECKPOINT_EVENTS):
            _apply(state, _batch(_skewed(rng), rng, offset))
        snapshot = state.begin_checkpoint()
        size = sum(len(key) + len(value or b"") for key, value in encode(snapshot, limits))
        state.commit_checkpoint(snapshot)
        figures.append(size / CHECKPOINT_EVENTS)
    return figures


def _warm_state(limits: StateLimits, rng: np.random.Generator) -> PartitionState:
    """Return a state with all users in memory, 40 events each, so that every memory page of it has been touched."""
    state = PartitionState(TriggerPolicy(), limits)
    names = _names(np.arange(USERS))
    state.load(names, nothing_stored(USERS, limits))
    for offset in _offsets(40 * USERS // BATCH, 0):
        _apply(state, _batch(np.arange(offset, offset + BATCH) % USERS, rng, offset))
    return state


def _time_batches(state: PartitionState, batches: list[ActionBatch]) -> float:
    """Return median microseconds per event; jobs are finished between batches, off the clock."""
    times = []
    for batch in batches:
        began = time.thread_time()
        state.missing(batch.users)
        effects = state.apply(batch, BEGIN_MS)
        times.append(time.thread_time() - began)
        _finish_jobs(state, effects.due)
    return float(np.median(times)) / BATCH * 1e6


def _time_cold(store: PartitionStore, batches: list[ActionBatch], limits: StateLimits) -> float:
    """Return median microseconds per event when no user is in memory: read, decode, load, apply."""
    times = []
    for batch in batches:
        state = PartitionState(TriggerPolicy(), limits)
        began = time.thread_time()
        cold = state.missing(batch.users)
        state.load(cold, read_users(store, cold, limits).stored)
        state.apply(batch, BEGIN_MS)
        times.append(time.thread_time() - began)
    return float(np.median(times)) / BATCH * 1e6


def _apply(state: PartitionState, batch: ActionBatch) -> None:
    _finish_jobs(state, state.apply(batch, BEGIN_MS).due)


def _finish_jobs(state: PartitionState, users: list[bytes]) -> None:
    job = state.begin_job(users)
    state.finish_job(job.sequences.users, job.offsets, BEGIN_MS)


def _offsets(batches: int, begin: int) -> Iterator[int]:
    return iter(range(begin, begin + batches * BATCH, BATCH))


def _skewed(rng: np.random.Generator) -> I64:
    return (USERS * rng.random(BATCH) ** 3).astype(np.int64)


def _distinct(rng: np.random.Generator) -> I64:
    return rng.choice(USERS, BATCH, replace=False)


def _names(users: I64) -> list[bytes]:
    return [b"user-%06d" % user for user in users.tolist()]


def _batch(users: I64, rng: np.random.Generator, offset: int) -> ActionBatch:
    """Return events in order, each with its own id, as a healthy producer sends them."""
    actions = np.zeros(len(users), ACTION_DTYPE)
    actions["item"] = rng.integers(1, 2**63, len(users))
    actions["event_id"] = rng.integers(1, 2**63, len(users))
    actions["action"] = 7
    actions["timestamp_ms"] = BEGIN_MS + offset + np.arange(len(users))
    offsets, arrival_ms = offset + np.arange(len(users)), np.full(len(users), BEGIN_MS)
    return ActionBatch(_names(users), actions, offsets, np.zeros(len(users), np.bool_), arrival_ms)


if __name__ == "__main__":
    run_command(bench)
