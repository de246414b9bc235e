"""The baselines of the stream benchmarks, each with what it needs, or the reason why it cannot run on this machine.

Quix Streams and Bytewax run in `.venv-peers`, which `make bench-ingest` creates; Faust runs in the environment of the
project; Kafka Streams is compiled with the JDK of the machine.
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

from infra.bench.stream.subject import Subject, committed
from infra.bench.stream.worker import PARTITIONS, SEQUENCE_LENGTH
from infra.errors import InfraError
from infra.harness.worker_process import Program, free_port, sample, scrape

BASELINES = Path(__file__).parent
ROOT = Path(__file__).parents[3]
VENV_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
KAFKA_STREAMS = "org.apache.kafka:kafka-streams:4.1.2"
EVERY_N = 1_000_000
WITHOUT_WEB = ("worker", "--without-web", "-l", "warn")


class BaselineUnavailable(InfraError):
    """A baseline cannot run on this machine; the text gives the reason."""


@dataclass(frozen=True, slots=True)
class Job:
    """The task, the same for all baselines."""

    bootstrap_servers: str
    folder: Path
    """Parent of the folders of the baselines."""
    kept: int = SEQUENCE_LENGTH
    """Actions kept per user."""
    release: Path | None = None
    """Release of the encoder, for baselines that embed."""
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    """Part of all names on the broker, which may have seen earlier runs."""

    def environment(self, name: str) -> dict[str, str]:
        """Return the variables that a baseline reads."""
        return {
            "BROKER": self.bootstrap_servers,
            "GROUP": f"{name}-{self.run}",
            "TOPIC": f"{name}-{self.run}-actions",
            "OUTPUT": f"{name}-{self.run}-due",
            "FOLDER": str(self.folder / name / "state"),
            "EVERY_N": str(EVERY_N),
            "KEPT": str(self.kept),
            "RELEASE": str(self.release or ""),
        }


def faust(job: Job) -> Subject:
    """Prepare idiomatic Faust, in the environment of the project."""
    return _prepared(job, "faust", (sys.executable, str(BASELINES / "idiomatic_faust.py"), *WITHOUT_WEB))


def quix(job: Job) -> Subject:
    """Prepare Quix Streams; raise `BaselineUnavailable` if it is not installed."""
    return _prepared(job, "quix", (_venv_python("quixstreams"), str(BASELINES / "quix_streams.py")))


def faust_encoder(job: Job) -> Subject:
    """Prepare idiomatic Faust that embeds, in the environment of the project."""
    command = (sys.executable, "-m", "infra.bench.baselines.faust_encoder", *WITHOUT_WEB)
    return _prepared(job, "faust", command, {"PYTHONPATH": str(ROOT)})


def quix_encoder(job: Job) -> Subject:
    """Prepare Quix Streams that embeds; raise `BaselineUnavailable` if it is not installed.

    The interpreter is that of the project, which has torch, with the packages of `.venv-peers` on its path.
    """
    _venv_python("quixstreams")
    packages = next(VENV_PYTHON.parents[1].glob("lib/python3*/site-packages"))
    path = os.pathsep.join([str(ROOT), str(packages)])
    return _prepared(job, "quix", (sys.executable, "-m", "infra.bench.baselines.quix_encoder"), {"PYTHONPATH": path})


ENCODERS = {"faust": faust_encoder, "quix": quix_encoder}


def bytewax(job: Job) -> Subject:
    """Prepare Bytewax with its recovery store and a snapshot per second; raise `BaselineUnavailable`.

    It commits no offsets. Its API server reports the items that it has taken; the snapshot that makes them durable
    follows within a second.
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
        return int(sample(scrape(port), "bytewax_item_inp_count_total", 'step_id="sequences.keep'))

    return replace(_prepared(job, "bytewax", command, environment), applied=applied, settle_s=1.5)


def kafka_streams(job: Job) -> Subject:
    """Compile and prepare Kafka Streams; raise `BaselineUnavailable` if there is no JDK or no network."""
    return _java(job, "KafkaStreamsBaseline")


def kafka_streams_windows(job: Job) -> Subject:
    """Prepare Kafka Streams with windowed aggregates; raise `BaselineUnavailable`."""
    return _java(job, "KafkaStreamsWindows")


def quix_windows(job: Job) -> Subject:
    """Prepare Quix Streams with windowed aggregates; raise `BaselineUnavailable` if it is not installed."""
    return _prepared(job, "quix", (_venv_python("quixstreams"), str(BASELINES / "quix_windows.py")))


WINDOWS = {"quix": quix_windows, "kafka-streams": kafka_streams_windows}


def _java(job: Job, main: str) -> Subject:
    """Compile and prepare a program of Kafka Streams."""
    java, javac = shutil.which("java"), shutil.which("javac")
    if not java or not javac:
        raise BaselineUnavailable("no JDK on this machine (javac); on Debian: apt-get install default-jdk-headless")
    try:
        jars = ":".join(str(jar) for jar in sorted(jgo.build(KAFKA_STREAMS).all_jars))
    except (requests.RequestException, RuntimeError, OSError, ValueError) as error:
        raise BaselineUnavailable(f"its jars cannot be downloaded from Maven Central: {error}") from error
    classes = job.folder / "kafka-streams" / "classes"
    source = BASELINES / "kafka_streams" / f"{main}.java"
    compiled = subprocess.run(
        [javac, "-cp", jars, "-d", str(classes), str(source)], capture_output=True, text=True, check=False
    )
    if compiled.returncode:
        raise BaselineUnavailable(f"it does not compile: {compiled.stderr.strip().splitlines()[0]}")
    return _prepared(job, "kafka-streams", (java, "-Xmx1g", "-cp", f"{classes}:{jars}", main))


def _prepared(job: Job, name: str, command: Sequence[str], extra: Mapping[str, str] | None = None) -> Subject:
    environment = {**job.environment(name), **(extra or {})}
    topic, output, folder = environment["TOPIC"], environment["OUTPUT"], job.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    admin = kafka.KafkaAdminClient(bootstrap_servers=job.bootstrap_servers)
    topics = {each: {"num_partitions": PARTITIONS, "replication_factor": 1} for each in (topic, output)}
    admin.create_topics(topics, wait_for_metadata=True)
    return Subject(
        program=Program(command, folder / "log", environment, folder, name),
        topic=topic,
        output=output,
        applied=lambda: committed(admin, environment["GROUP"], topic),
    )


def _venv_python(package: str) -> str:
    """Return the interpreter of `.venv-peers` if it has the package."""
    if not VENV_PYTHON.exists():
        raise BaselineUnavailable(".venv-peers does not exist; `make bench-ingest` creates it")
    found = subprocess.run([str(VENV_PYTHON), "-c", f"import {package}"], capture_output=True, text=True, check=False)
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1]
        raise BaselineUnavailable(f"{package} cannot be imported in .venv-peers: {reason}")
    return str(VENV_PYTHON)
