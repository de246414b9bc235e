"""Deploy one application for a run: its own topics on a broker, a folder, a random release, and settings.

Everything is small and fast: sequences of 32 actions, chunks of 8, four partitions, sessions of 6 s, a checkpoint
every 500 ms. The encoder is tiny, because the subject of these runs is its input.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.inference import EncoderRuntime, load_runtime
from encoder.model import EncoderConfig
from infra.harness.feature_files import write_features
from infra.harness.releases import random_release
from infra.kafka.topics import ensure_topics
from streams.config.settings import Settings

Overrides = Mapping[str, Mapping[str, Any]]
"""Settings by group and key."""

ENCODER = EncoderConfig(
    d_model=32, heads=4, kv_heads=2, windows=(12, 12), embedding_dim=16, item_dim=16, sequence_length=32
)
CACHE_BYTES = 8 << 20
SEED = 1

DEFAULTS: Overrides = {
    "topics": {"partitions": 4},
    "kafka": {"session_timeout_ms": 6_000, "heartbeat_interval_ms": 1_000, "transaction_timeout_ms": 10_000},
    "state": {"sequence_length": 32, "chunk_length": 8, "hot_users_max": 4_096},
    "checkpoint": {"interval_ms": 500},
    "worker": {"watchdog_timeout_ms": 20_000, "shutdown_timeout_ms": 15_000},
    "encoder": {"cache_bytes_max": CACHE_BYTES, "dtype": "fp32"},
    "output": {"request_timeout_ms": 5_000},
    "web": {"port": 0},
}


@dataclass(frozen=True, slots=True)
class Deployment:
    """One application on one broker or cluster."""

    folder: Path
    settings: Settings
    """Settings that all workers share."""
    config: Path
    """File that holds the settings."""
    release_dir: Path
    brokers: int = 1
    """Number of brokers, and of replicas of each topic."""

    @property
    def has_features(self) -> bool:
        """Whether the workers compute features."""
        return self.settings.features.definitions_file is not None

    def oracle(self) -> EncoderRuntime:
        """Return an encoder that makes a full pass over each history, to compare published embeddings with."""
        return load_runtime(self.release_dir, kind="full", cache_bytes_max=CACHE_BYTES, dtype="fp32")

    def worker_environment(self, number: int) -> dict[str, str]:
        """Return the settings that only worker `number` has, as environment variables."""
        return {
            "STREAMFORMER_DATA_DIR": str(self.data_dir(number)),
            "STREAMFORMER_WORKER_INSTANCE_ID": f"{self.settings.app_id}-{number}",
        }

    def data_dir(self, number: int) -> Path:
        """Return the folder that serves worker `number` as its local disk."""
        return self.folder / f"worker-{number}"


def deploy(
    folder: Path,
    bootstrap_servers: str,
    name: str,
    overrides: Overrides | None = None,
    *,
    brokers: int = 1,
    features: bool = False,
) -> Deployment:
    """Write a release and a settings file, and create the topics with one replica per broker.

    `overrides` take precedence over `DEFAULTS`. With `features` the workers compute features of every kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    release_dir = folder / "release"
    random_release(ENCODER, seed=SEED).save(release_dir)
    groups = {group: {**values} for group, values in DEFAULTS.items()}
    groups["topics"].update(actions=f"{name}-in", embeddings=f"{name}-out", dead_letter=f"{name}-dead")
    groups["topics"].update(features=f"{name}-features")
    groups["kafka"]["bootstrap_servers"] = bootstrap_servers
    groups["encoder"]["release_dir"] = str(release_dir)
    if features:
        groups["features"] = write_features(folder)
    for group, values in (overrides or {}).items():
        groups.setdefault(group, {}).update(values)
    config = folder / "settings.toml"
    config.write_text(_toml({"app_id": name}, groups))
    settings = Settings(**tomllib.loads(config.read_text()))
    ensure_topics(settings, replication_factor=brokers)
    return Deployment(folder, settings, config, release_dir, brokers)


def _toml(top: Mapping[str, Any], groups: Overrides) -> str:
    lines = [f"{key} = {_literal(value)}" for key, value in top.items()]
    for group, values in groups.items():
        lines += ["", f"[{group}]", *(f"{key} = {_literal(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
