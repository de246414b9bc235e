"""A Streamformer worker as the stream benchmarks run it: the shipped command, a job, an encoder of random weights.

Kept actions, triggers and encoder are those of the job, checkpoint interval and fetch sizes the defaults.
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

from encoder.actions.columns import item_key
from encoder.features import Vocabularies
from encoder.items import TrainedItems
from encoder.model import EncoderConfig, build_encoder, initialize
from encoder.release import make_release
from infra.bench.baselines.processes import Contestant, committed, free_port, sample, scrape
from infra.kafka.topics import ensure_topics
from streams.config.groups import (
    EncoderSettings,
    KafkaSettings,
    StateSettings,
    TopicsSettings,
    TriggersSettings,
    WebSettings,
    WorkerSettings,
)
from streams.config.settings import Settings

PARTITIONS = 4
SEQUENCE_LENGTH = 64
TINY = EncoderConfig(
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


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """What a measured worker is to do."""

    policy: str = "[triggers]\nevery_n = 1_000_000\n"
    """Triggers, in TOML; as it stands, none fires and the encoder is loaded and never called."""
    encoder: EncoderConfig = TINY
    cache_bytes_max: int = 1 << 20
    items: int = 100
    """Known to the encoder; further ones share its unknown row."""
    hot_users_max: int = 65_536
    """Users of a partition in memory."""


NO_TRIGGERS = WorkerJob()


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
    def partitions_ready(self) -> int:
        """Partitions that are restored and being read."""
        lines = scrape(self.settings.web.port).splitlines()
        return int(sample("\n".join(line for line in lines if 'state="ready"' in line), "streamformer_partitions"))


def prepare_worker(name: str, bootstrap_servers: str, folder: Path, job: WorkerJob = NO_TRIGGERS) -> MeasuredWorker:
    """Create the worker's topics, release and policy, in `folder`; start it with `Running.start(worker.contestant)`.

    Its application id and topics are its own, also on a broker that has seen earlier runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "policy.toml").write_text(job.policy)
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
        state=StateSettings(sequence_length=job.encoder.sequence_length, hot_users_max=job.hot_users_max),
        web=WebSettings(port=free_port()),
        encoder=EncoderSettings(release_dir=folder / "release", cache_bytes_max=job.cache_bytes_max),
        triggers=TriggersSettings(policy_file=folder / "policy.toml"),
        worker=WorkerSettings(instance_id=app_id),
    )
    ensure_topics(settings)
    save_random_release(folder / "release", job.encoder, job.items)
    return _measured(name, settings, folder)


def join_worker(first: MeasuredWorker, name: str, folder: Path) -> MeasuredWorker:
    """One more worker of the same application, with its own disk, port and instance id."""
    settings = first.settings.model_copy(
        update={
            "data_dir": folder / "data",
            "web": WebSettings(port=free_port()),
            "worker": WorkerSettings(instance_id=f"{first.settings.app_id}-{name}"),
        }
    )
    return _measured(name, settings, folder)


def _measured(name: str, settings: Settings, folder: Path) -> MeasuredWorker:
    admin = kafka.KafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    contestant = Contestant(
        name=name,
        topic=settings.topics.actions,
        command=(sys.executable, "-m", "infra.cli", "worker"),
        environment={**os.environ, **_environment(settings)},
        folder=folder,
        applied=lambda: committed(admin, settings.app_id, settings.topics.actions),
    )
    return MeasuredWorker(settings, contestant)


def _environment(settings: Settings) -> dict[str, str]:
    values = {
        "APP_ID": settings.app_id,
        "DATA_DIR": settings.data_dir,
        "KAFKA_BOOTSTRAP_SERVERS": settings.kafka.bootstrap_servers,
        "TOPICS_ACTIONS": settings.topics.actions,
        "TOPICS_EMBEDDINGS": settings.topics.embeddings,
        "TOPICS_DEAD_LETTER": settings.topics.dead_letter,
        "TOPICS_PARTITIONS": settings.topics.partitions,
        "STATE_SEQUENCE_LENGTH": settings.state.sequence_length,
        "STATE_HOT_USERS_MAX": settings.state.hot_users_max,
        "WEB_PORT": settings.web.port,
        "WORKER_INSTANCE_ID": settings.worker.instance_id,
        "TRIGGERS_POLICY_FILE": settings.triggers.policy_file,
        "ENCODER_RELEASE_DIR": settings.encoder.release_dir,
        "ENCODER_CACHE_BYTES_MAX": settings.encoder.cache_bytes_max,
    }
    return {f"STREAMFORMER_{name}": str(value) for name, value in values.items()}


def save_random_release(folder: Path, config: EncoderConfig, items: int) -> None:
    """An encoder with random weights, seed 0, as a release; its items are `item-0` and so on."""
    keys = np.sort(np.array([item_key(f"item-{number}") for number in range(items)], np.uint64))
    vocabularies = Vocabularies(keys, ("view", "click", "save", "share"), ("home",))
    model = build_encoder(
        config,
        TrainedItems(len(vocabularies.item_keys), config.item_dim),
        actions=len(vocabularies.actions),
        surfaces=len(vocabularies.surfaces),
    )
    initialize(model, torch.Generator().manual_seed(0))
    make_release(model, vocabularies, metrics={}, training={"made_by": "benchmark", "seed": 0}).save(folder)
