"""A worker checks its surroundings before it begins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from encoder.model import EncoderConfig
from streams.app import _parts_config, load_encoder
from streams.config.groups import EncoderSettings, StateSettings
from streams.config.settings import Settings
from streams.errors import SettingsError
from streams.parts import WorkerParts
from streams.telemetry.metrics import Metrics
from tests.unit.inference.histories import random_release

STREAMING = EncoderConfig(
    d_model=16, heads=2, kv_heads=1, windows=(9, 8), embedding_dim=8, item_dim=8, sequence_length=32
)
"""Looks back 16 actions, and needs the time of the one before."""
WINDOW = EncoderConfig(
    kind="window",
    d_model=16,
    heads=2,
    kv_heads=2,
    windows=(16, 16),
    embedding_dim=8,
    item_dim=8,
    sequence_length=16,
    time_bias=False,
)


def settings(folder: Path, config: EncoderConfig, kept: int) -> Settings:
    """Save a release of an encoder; return settings that run it on a state of `kept` actions per user."""
    random_release(config, 1).save(folder)
    runtime = "incremental" if config.kind == "streaming" else "full"
    return Settings(
        state=StateSettings(sequence_length=kept, chunk_length=1),
        encoder=EncoderSettings(release_dir=folder, runtime=runtime, dtype="fp32", cache_bytes_max=1 << 20),
    )


@pytest.mark.parametrize(("config", "needed"), [(STREAMING, 17), (WINDOW, 16)])
def test_a_state_shorter_than_the_release_looks_back_is_refused(
    config: EncoderConfig, needed: int, tmp_path: Path
) -> None:
    """A worker refuses to start when the state keeps fewer actions than the release looks back, and names both."""
    for kept in (8, needed - 1):
        with pytest.raises(SettingsError, match=rf"keeps {kept} actions .* looks back {needed}.* at least {needed}"):
            load_encoder(settings(tmp_path, config, kept))
    assert load_encoder(settings(tmp_path, config, needed)).actions_needed == needed


@pytest.mark.parametrize(("assigned", "each"), [(2, 300), (4, 150)])
def test_partitions_share_the_users_that_a_worker_may_have_in_memory(assigned: int, each: int) -> None:
    """A worker with four partitions instead of two holds no more users: each state holds half as many."""
    bounds = Settings(state=StateSettings(hot_users_worker_max=600, hot_users_max=300), kafka={"poll_records_max": 100})
    worker = parts_of(bounds)
    worker.partitions.assigned = frozenset(range(assigned))
    assert worker.new_state().room == each


def parts_of(settings: Settings) -> WorkerParts:
    """Return a worker's parts without an encoder."""
    runtime: Any = None
    return WorkerParts(_parts_config(settings), runtime, Metrics(), now_ms=lambda: 0, abort=lambda reason: None)


@pytest.mark.parametrize(("user_ttl_ms", "incarnations"), [(0, [1, 1]), (1_000, [1, 2])])
def test_a_partition_that_returns_at_its_offset_keeps_its_cache_only_without_a_ttl(
    user_ttl_ms: int, incarnations: list[int]
) -> None:
    """Another worker may have forgotten users in the meantime without having applied an event."""
    worker = parts_of(Settings(state=StateSettings(user_ttl_ms=user_ttl_ms)))
    owned: Any = SimpleNamespace(tp=SimpleNamespace(partition=3), rebuilt=False, next_offset=40)
    seen = [worker._incarnation(owned)]
    worker._revoked_at[3] = 40
    assert [*seen, worker._incarnation(owned)] == incarnations
