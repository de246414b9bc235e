"""Where a run takes place: names of its own on a broker, a folder, a release with random weights, and its settings.

Everything is small and fast: sequences of 32 actions, chunks of 8, four partitions, sessions of 6 s, a checkpoint each
half second. A tiny encoder does, for what is tested is that its input is right.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoder.actions.columns import item_key
from encoder.features import Vocabularies
from encoder.inference import EncoderRuntime, load_runtime
from encoder.items import TrainedItems
from encoder.model import EncoderConfig, build_encoder, initialize
from encoder.release import make_release
from infra.kafka.topics import ensure_topics
from streams.config.settings import Settings

ACTION_NAMES = ("view", "click", "save")
SURFACES = ("home", "search")
ITEMS = 1_000
ENCODER = EncoderConfig(
    d_model=32, heads=4, kv_heads=2, windows=(12, 12), embedding_dim=16, item_dim=16, sequence_length=32
)
CACHE_BYTES = 8 << 20

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
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
    """One application on one broker."""

    folder: Path
    settings: Settings
    """As the workers read them, but for what each has of its own (folder, name)."""
    config: Path
    """The settings as a file."""
    release_dir: Path

    def oracle(self) -> EncoderRuntime:
        """The encoder as full passes over whole histories: what published embeddings are held against."""
        return load_runtime(self.release_dir, kind="full", cache_bytes_max=CACHE_BYTES, dtype="fp32")

    def worker_environment(self, number: int) -> dict[str, str]:
        """What worker `number` has of its own."""
        return {
            "STREAMFORMER_DATA_DIR": str(self.data_dir(number)),
            "STREAMFORMER_WORKER_INSTANCE_ID": f"{self.settings.app_id}-{number}",
        }

    def data_dir(self, number: int) -> Path:
        return self.folder / f"worker-{number}"


def deploy(
    folder: Path, bootstrap_servers: str, name: str, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> Deployment:
    """A release, a settings file and the topics; `overrides` (group -> key -> value) go over `DEFAULTS`."""
    folder.mkdir(parents=True, exist_ok=True)
    release_dir = folder / "release"
    _release(1).save(release_dir)
    groups = {group: {**values} for group, values in DEFAULTS.items()}
    groups["topics"].update(actions=f"{name}-in", embeddings=f"{name}-out", dead_letter=f"{name}-dead")
    groups["kafka"]["bootstrap_servers"] = bootstrap_servers
    groups["encoder"]["release_dir"] = str(release_dir)
    for group, values in (overrides or {}).items():
        groups.setdefault(group, {}).update(values)
    config = folder / "settings.toml"
    config.write_text(_toml({"app_id": name}, groups))
    settings = Settings(**tomllib.loads(config.read_text()))
    ensure_topics(settings)
    return Deployment(folder, settings, config, release_dir)


def _toml(top: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{key} = {_literal(value)}" for key, value in top.items()]
    for group, values in groups.items():
        lines += ["", f"[{group}]", *(f"{key} = {_literal(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def _release(seed: int) -> Any:
    """Random weights, large enough that every action moves the embedding."""
    generator = torch.Generator().manual_seed(seed)
    keys = np.sort(np.array([item_key(f"item-{number}") for number in range(ITEMS)], np.uint64))
    items = TrainedItems(ITEMS, ENCODER.item_dim)
    model = build_encoder(ENCODER, items, actions=len(ACTION_NAMES), surfaces=len(SURFACES))
    initialize(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty_like(parameter).normal_(0, 1, generator=generator)
            parameter.add_(noise * (parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1))
    return make_release(model, Vocabularies(keys, ACTION_NAMES, SURFACES), metrics={}, training={})
