"""The peers of the stream benchmarks as contestants, each with what it needs, or the reason why it cannot run here.

The programs are in `peers/`. Quix Streams and Bytewax run in `.venv-peers`, which `make bench-ingest` creates; Faust in
our own environment; Kafka Streams is compiled with the machine's JDK.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jgo
import kafka
import requests

from infra.bench.baselines.processes import Contestant, committed, free_port, sample, scrape
from infra.bench.stream.worker import PARTITIONS, SEQUENCE_LENGTH
from infra.errors import InfraError

BASELINES = Path(__file__).parent
ROOT = Path(__file__).parents[3]
VENV_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
KAFKA_STREAMS = "org.apache.kafka:kafka-streams:4.1.2"
EVERY_N = 1_000_000


class PeerUnavailable(InfraError):
    """A peer cannot run on this machine; the text says why."""


@dataclass(frozen=True, slots=True)
class Job:
    """What all peers are told."""

    bootstrap_servers: str
    folder: Path
    """Under which each has a folder of its own."""
    kept: int = SEQUENCE_LENGTH
    """Actions of a user."""
    release: Path | None = None
    """Of the encoder, for those that embed."""
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    """In all names on the broker, which may have seen earlier runs."""

    def environment(self, name: str) -> dict[str, str]:
        return {
            **os.environ,
            "BROKER": self.bootstrap_servers,
            "GROUP": f"{name}-{self.run}",
            "TOPIC": f"{name}-{self.run}-actions",
            "OUTPUT": f"{name}-{self.run}-due",
            "FOLDER": str(self.folder / name / "state"),
            "EVERY_N": str(EVERY_N),
            "KEPT": str(self.kept),
            "RELEASE": str(self.release or ""),
        }


def faust_peer(job: Job) -> Contestant:
    """Idiomatic Faust, in our own environment."""
    command = (sys.executable, str(BASELINES / "idiomatic_faust.py"), "worker", "--without-web", "-l", "warn")
    return _contestant(job, "faust", command)


def quix_peer(job: Job) -> Contestant:
    """Quix Streams; raises `PeerUnavailable`."""
    return _contestant(job, "quix", (_venv_python("quixstreams"), str(BASELINES / "quix_streams.py")))


def faust_encoder_peer(job: Job) -> Contestant:
    """Idiomatic Faust that embeds, in our own environment."""
    command = (sys.executable, "-m", "infra.bench.baselines.faust_encoder", "worker", "--without-web", "-l", "warn")
    return _contestant(job, "faust", command, {"PYTHONPATH": str(ROOT)})


def quix_encoder_peer(job: Job) -> Contestant:
    """Quix Streams that embeds: our own interpreter, for torch, with its packages; raises `PeerUnavailable`."""
    _venv_python("quixstreams")
    packages = next(VENV_PYTHON.parents[1].glob("lib/python3*/site-packages"))
    path = os.pathsep.join([str(ROOT), str(packages)])
    return _contestant(job, "quix", (sys.executable, "-m", "infra.bench.baselines.quix_encoder"), {"PYTHONPATH": path})


ENCODING_PEERS = {"faust": faust_encoder_peer, "quix": quix_encoder_peer}


def bytewax_peer(job: Job) -> Contestant:
    """Bytewax with its recovery store, a snapshot each second; raises `PeerUnavailable`.

    It commits no offsets: its own count of items, which its API server tells, says how far it is, and the snapshot
    that makes them durable comes within a second.
    """
    python = _venv_python("bytewax")
    recovery = job.folder / "bytewax" / "recovery"
    recovery.mkdir(parents=True)
    subprocess.run([python, "-m", "bytewax.recovery", str(recovery), "1"], check=True, capture_output=True)
    port = free_port()
    flow = f"{BASELINES / 'bytewax_flow.py'}:flow"
    command = (python, "-m", "bytewax.run", flow, "-r", str(recovery), "-s", "1", "-b", "0", "-w", "1")
    environment = {"BYTEWAX_DATAFLOW_API_ENABLED": "1", "BYTEWAX_DATAFLOW_API_PORT": str(port)}

    def applied() -> int:
        lines = [line for line in scrape(port).splitlines() if 'step_id="sequences.keep' in line]
        return int(sample("\n".join(lines), "bytewax_item_inp_count_total"))

    contestant = _contestant(job, "bytewax", command, environment)
    return replace(contestant, applied=applied, settle_s=1.5)


def kafka_streams_peer(job: Job) -> Contestant:
    """Kafka Streams on the machine's Java, compiled here; raises `PeerUnavailable`."""
    java, javac = shutil.which("java"), shutil.which("javac")
    if not java or not javac:
        raise PeerUnavailable("no JDK on this machine (javac); on Debian: apt-get install default-jdk-headless")
    try:
        jars = ":".join(str(jar) for jar in sorted(jgo.build(KAFKA_STREAMS).all_jars))
    except (requests.RequestException, RuntimeError, OSError, ValueError) as error:
        raise PeerUnavailable(f"its jars cannot be downloaded from Maven Central: {error}") from error
    classes = job.folder / "kafka-streams" / "classes"
    compiled = subprocess.run(
        [javac, "-cp", jars, "-d", str(classes), str(BASELINES / "kafka_streams" / "KafkaStreamsPeer.java")],
        capture_output=True,
        text=True,
        check=False,
    )
    if compiled.returncode:
        raise PeerUnavailable(f"it does not compile: {compiled.stderr.strip().splitlines()[0]}")
    return _contestant(job, "kafka-streams", (java, "-Xmx1g", "-cp", f"{classes}:{jars}", "KafkaStreamsPeer"))


def _contestant(
    job: Job,
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> Contestant:
    settings = job.environment(name)
    admin = kafka.KafkaAdminClient(bootstrap_servers=job.bootstrap_servers)
    topics = {topic: {"num_partitions": PARTITIONS, "replication_factor": 1} for topic in _topics(settings)}
    admin.create_topics(topics, wait_for_metadata=True)
    return Contestant(
        name=name,
        topic=settings["TOPIC"],
        command=command,
        environment={**settings, **(environment or {})},
        folder=job.folder / name,
        applied=lambda: committed(admin, settings["GROUP"], settings["TOPIC"]),
    )


def _topics(settings: Mapping[str, str]) -> tuple[str, str]:
    return settings["TOPIC"], settings["OUTPUT"]


def _venv_python(package: str) -> str:
    """The interpreter of `.venv-peers`, if it has the package."""
    if not VENV_PYTHON.exists():
        raise PeerUnavailable(".venv-peers does not exist; `make bench-ingest` creates it")
    found = subprocess.run([str(VENV_PYTHON), "-c", f"import {package}"], capture_output=True, text=True, check=False)
    if found.returncode:
        raise PeerUnavailable(f"{package} cannot be imported in .venv-peers: {found.stderr.strip().splitlines()[-1]}")
    return str(VENV_PYTHON)
