"""A Streamformer worker as the stream benchmarks run it: the shipped command, a policy that never fires.

Kept actions, checkpoint interval and fetch sizes are those of the job or the defaults. The release is an encoder of
random weights: it is loaded and never called.
"""

from __future__ import annotations

import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

import kafka
import numpy as np
import torch

from encoder.features import Vocabularies
from encoder.items import TrainedItems
from encoder.model import EncoderConfig, build_encoder, initialize
from encoder.release import make_release
from infra.bench.contestants import Contestant, committed, free_port, sample, scrape
from infra.topics import ensure_topics
from streams.settings import KafkaSettings, Settings, StateSettings, TopicsSettings, WebSettings

PARTITIONS = 4
SEQUENCE_LENGTH = 64
POLICY = "[triggers]\nevery_n = 1_000_000\n"


@dataclass(frozen=True, slots=True)
class MeasuredWorker:
    """One worker's settings, its topics created, and what it says of itself."""

    settings: Settings
    contestant: Contestant

    @property
    def topic(self) -> str:
        return self.settings.topics.actions

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels, as `/metrics` has it now; 0 while the worker does not answer."""
        return sample(scrape(self.settings.web.port), name)

    @property
    def is_ready(self) -> bool:
        """Whether every partition is restored and being read."""
        text = scrape(self.settings.web.port)
        return sample(text, "streamformer_partitions") == PARTITIONS and 'state="restoring"} 0.0' in text


def prepare_worker(name: str, bootstrap_servers: str, folder: Path) -> MeasuredWorker:
    """Create the worker's topics, release and policy, in `folder`; start it with `Running.start(worker.contestant)`.

    Its application id and topics are its own, also on a broker that has seen earlier runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    app_id = f"{name}-{uuid.uuid4().hex[:8]}"
    settings = Settings(
        app_id=app_id,
        data_dir=folder / "data",
        kafka=KafkaSettings(bootstrap_servers=bootstrap_servers),
        topics=TopicsSettings(
            actions=f"{app_id}-actions",
            embeddings=f"{app_id}-embeddings",
            dead_letter=f"{app_id}-dead-letter",
            partitions=PARTITIONS,
        ),
        state=StateSettings(sequence_length=SEQUENCE_LENGTH),
        web=WebSettings(port=free_port()),
    )
    ensure_topics(settings)
    (folder / "policy.toml").write_text(POLICY)
    save_random_release(folder / "release")
    admin = kafka.KafkaAdminClient(bootstrap_servers=bootstrap_servers)
    contestant = Contestant(
        name=name,
        topic=settings.topics.actions,
        command=(sys.executable, "-m", "infra.cli", "worker"),
        environment={**os.environ, **_environment(settings, folder)},
        folder=folder,
        applied=lambda: committed(admin, settings.app_id, settings.topics.actions),
    )
    return MeasuredWorker(settings, contestant)


def _environment(settings: Settings, folder: Path) -> dict[str, str]:
    values = {
        "APP_ID": settings.app_id,
        "DATA_DIR": settings.data_dir,
        "KAFKA_BOOTSTRAP_SERVERS": settings.kafka.bootstrap_servers,
        "TOPICS_ACTIONS": settings.topics.actions,
        "TOPICS_EMBEDDINGS": settings.topics.embeddings,
        "TOPICS_DEAD_LETTER": settings.topics.dead_letter,
        "TOPICS_PARTITIONS": settings.topics.partitions,
        "STATE_SEQUENCE_LENGTH": settings.state.sequence_length,
        "WEB_PORT": settings.web.port,
        "WORKER_INSTANCE_ID": settings.app_id,
        "TRIGGERS_POLICY_FILE": folder / "policy.toml",
        "ENCODER_RELEASE_DIR": folder / "release",
        "ENCODER_DTYPE": "fp32",
        "ENCODER_CACHE_BYTES_MAX": 1 << 20,
    }
    return {f"STREAMFORMER_{name}": str(value) for name, value in values.items()}


def save_random_release(folder: Path) -> None:
    """A very small encoder with random weights, seed 0, as a release."""
    config = EncoderConfig(
        d_model=16,
        heads=2,
        kv_heads=1,
        windows=(16, 16),
        embedding_dim=16,
        item_dim=16,
        action_dim=4,
        surface_dim=4,
        sequence_length=SEQUENCE_LENGTH,
    )
    vocabularies = Vocabularies(np.arange(1, 101, dtype=np.uint64), ("view", "click", "save", "share"), ("home",))
    model = build_encoder(
        config,
        TrainedItems(len(vocabularies.item_keys), config.item_dim),
        actions=len(vocabularies.actions),
        surfaces=len(vocabularies.surfaces),
    )
    initialize(model, torch.Generator().manual_seed(0))
    make_release(model, vocabularies, metrics={}, training={"made_by": "benchmark", "seed": 0}).save(folder)
