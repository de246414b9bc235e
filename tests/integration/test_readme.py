"""The Python code of README.md runs as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kafka import KafkaConsumer, KafkaProducer

from infra.kafka.broker import Broker
from infra.kafka.topics import ensure_topics
from streams.options import settings_of
from streams.wire.embeddings import EmbeddingBatch, EmbeddingCodec, encode_embeddings

pytestmark = pytest.mark.broker

README = Path(__file__).parents[2] / "README.md"
ADDRESS = "127.0.0.1:9092"


@pytest.fixture
def own_broker() -> Iterator[Broker]:
    """A broker of the test's own, because the code uses the topics' default names."""
    with Broker.start() as broker:
        ensure_topics(settings_of(None, broker.bootstrap_servers))
        yield broker


def test_one_action_and_one_embedding_in_ten_lines(own_broker: Broker) -> None:
    """The code sends an action, and prints the embedding that a worker publishes after it, in ten lines or fewer."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 10
    assert ADDRESS in code
    servers = own_broker.bootstrap_servers
    process = subprocess.Popen(
        [sys.executable, "-c", code.replace(ADDRESS, servers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        publish_embedding_of(first_user(servers), servers)
        out, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, error) == (0, "")
    assert out == "[ 0.5 -2. ] 7\n"


def first_user(servers: str) -> bytes:
    """Wait for the first action and return its user, as a worker would."""
    consumer = KafkaConsumer(
        "user-actions", bootstrap_servers=servers, auto_offset_reset="earliest", consumer_timeout_ms=30_000
    )
    user: bytes = next(consumer).key
    consumer.close()
    return user


def publish_embedding_of(user: bytes, servers: str) -> None:
    """Write an embedding with the worker's own code."""
    one = np.array([7])
    vectors = np.array([[0.5, -2.0]], np.float32)
    batch = EmbeddingBatch([user], vectors, one, one, ["every_n"], one, "v1", 1_700_000_000_000)
    producer = KafkaProducer(bootstrap_servers=servers)
    for key, value, headers in encode_embeddings(batch, EmbeddingCodec.FLOAT32):
        producer.send("user-embeddings", key=key, value=value, headers=headers).get(timeout=10)
    producer.close()
