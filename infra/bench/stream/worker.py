"""A Streamformer worker as the stream benchmarks run it: the shipped command, a job, an encoder with random weights.

The job sets kept actions, triggers and encoder; checkpoint interval and fetch sizes are the defaults.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kafka

from encoder.model import EncoderConfig
from infra.bench.stream.subject import Subject, committed
from infra.harness.releases import random_release, vocabularies
from infra.harness.worker_process import free_port, sample, scrape, with_values, worker_program
from infra.kafka.topics import ensure_topics
from streams.config.settings import Settings, load_settings

PARTITIONS = 4
SEQUENCE_LENGTH = 64
ACTIONS = ("view", "click", "save", "share")
SURFACES = ("home",)
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
    """The task of a measured worker."""

    policy: str = "[triggers]\nevery_n = 1_000_000\n"
    """Triggers, in TOML; by default none fires, and the encoder is loaded but never called."""
    encoder: EncoderConfig = TINY
    cache_bytes_max: int = 1 << 20
    items: int = 100
    """Items that the encoder knows; all others share its unknown row."""
    hot_users_max: int = 65_536
    """Users of one partition in memory."""
    is_embedding: bool = True
    """Whether the worker has a release; without one it computes features only."""
    definitions: str = ""
    """Feature definitions, in TOML; without any no features are computed."""
    attributes: Path | None = None
    """Item attributes that the definitions use."""


NO_TRIGGERS = WorkerJob()


@dataclass(frozen=True, slots=True)
class MeasuredWorker:
    """A worker that is ready to be started, and the metrics that it exports once it runs."""

    values: Mapping[str, Any]
    """Settings that the benchmark chose."""
    settings: Settings
    subject: Subject

    @property
    def client(self) -> dict[str, str]:
        """Connection options for any Kafka client."""
        return {"bootstrap_servers": self.settings.kafka.bootstrap_servers}

    def metric(self, name: str, labels: str = "") -> float:
        """Return the sum of a metric over its labels, as `/metrics` has it now; 0 while the worker does not answer."""
        return sample(scrape(self.settings.web.port), name, labels)

    @property
    def partitions_ready(self) -> int:
        """Partitions that are restored and being read."""
        return int(self.metric("streamformer_partitions", 'state="ready"'))


def prepare_worker(name: str, bootstrap_servers: str, folder: Path, job: WorkerJob = NO_TRIGGERS) -> MeasuredWorker:
    """Create topics, release and policy of a worker, in `folder`; `running(worker.subject.program)` starts it.

    Application id and topics are unique, also on a broker that has seen earlier runs.
    """
    app_id = f"{name}-{uuid.uuid4().hex[:8]}"
    values = {
        "app_id": app_id,
        "data_dir": folder / "data",
        "kafka.bootstrap_servers": bootstrap_servers,
        "topics.actions": f"{app_id}-actions",
        "topics.embeddings": f"{app_id}-embeddings",
        "topics.dead_letter": f"{app_id}-dead-letter",
        "topics.partitions": PARTITIONS,
        "state.sequence_length": job.encoder.sequence_length,
        "state.hot_users_max": job.hot_users_max,
        "web.port": free_port(),
        "encoder.cache_bytes_max": job.cache_bytes_max,
        "triggers.policy_file": folder / "policy.toml",
        "worker.instance_id": app_id,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "policy.toml").write_text(job.policy)
    if job.is_embedding:
        values["encoder.release_dir"] = folder / "release"
        random_release(job.encoder, vocabularies(job.items, ACTIONS, SURFACES)).save(folder / "release")
    if job.definitions:
        (folder / "features.toml").write_text(job.definitions)
        values |= {"topics.features": f"{app_id}-features", "features.definitions_file": folder / "features.toml"}
        if job.attributes:
            values["features.attributes_file"] = job.attributes
    worker = _measured(name, values, folder)
    ensure_topics(worker.settings)
    return worker


def join_worker(first: MeasuredWorker, name: str, folder: Path) -> MeasuredWorker:
    """Return one more worker of the same application, with its own disk, port and instance id."""
    own = {
        "data_dir": folder / "data",
        "web.port": free_port(),
        "worker.instance_id": f"{first.settings.app_id}-{name}",
    }
    return _measured(name, {**first.values, **own}, folder)


def _measured(name: str, values: Mapping[str, Any], folder: Path) -> MeasuredWorker:
    settings = with_values(load_settings(), values)
    topics = settings.topics
    admin = kafka.KafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    subject = Subject(
        program=replace(worker_program(values, folder / "log"), name=name),
        topic=topics.actions,
        output=topics.embeddings,
        applied=lambda: committed(admin, settings.app_id, topics.actions),
    )
    return MeasuredWorker(values, settings, subject)
