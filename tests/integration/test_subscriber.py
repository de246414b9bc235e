"""The subscriber and `streamformer tail` on a real broker."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
from kafka import KafkaAdminClient, KafkaProducer

from infra.kafka.broker import Broker, ExternalBroker
from streams.errors import BrokerUnreachable, StreamformerError
from streams.subscriber import EmbeddingSubscriber
from streams.wire.embeddings import (
    Embedding,
    EmbeddingBatch,
    EmbeddingCodec,
    Message,
    Tombstone,
    encode_embeddings,
    encode_tombstone,
)

pytestmark = pytest.mark.broker


class Publisher:
    """Writes embeddings as a worker does, to the two partitions of one topic."""

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        self.bootstrap_servers, self.topic = bootstrap_servers, topic
        admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers)
        admin.create_topics(
            {topic: {"num_partitions": 2, "replication_factor": 1, "configs": {"cleanup.policy": "compact"}}},
            wait_for_metadata=True,
        )
        admin.close()
        self._producer = KafkaProducer(bootstrap_servers=bootstrap_servers)

    def embed(self, user: str, offset: int, version: str = "v1") -> None:
        """Write an embedding."""
        one = np.array([offset])
        batch = EmbeddingBatch(
            [user.encode()], np.full((1, 3), offset, np.float32), one, one, ["every_n"], one, version, 1_700_000_000_000
        )
        for message in encode_embeddings(batch, EmbeddingCodec.FLOAT32):
            self.send(message)

    def send(self, message: Message) -> None:
        """Write any message, to the user's partition."""
        key, value, headers = message
        self._producer.send(self.topic, key=key, value=value, headers=headers).get(timeout=10)

    def close(self) -> None:
        """Close the producer."""
        self._producer.close()


@pytest.fixture
def publisher(broker: Broker | ExternalBroker, topic_prefix: str) -> Iterator[Publisher]:
    """Return a publisher to a new topic of two partitions."""
    publisher = Publisher(broker.bootstrap_servers, topic_prefix)
    yield publisher
    publisher.close()


def read(subscriber: EmbeddingSubscriber, count: int) -> list[tuple[str, int]]:
    """Return the next `count` changes, a tombstone as -1; fail after ten seconds."""
    changes: list[tuple[str, int]] = []
    deadline = time.monotonic() + 10
    while len(changes) < count and time.monotonic() < deadline:
        for change in subscriber.poll(200):
            changes.append((change.user, change.metadata.source_offset if isinstance(change, Embedding) else -1))
    assert len(changes) == count
    return changes


def test_changes_come_as_they_are_published(publisher: Publisher) -> None:
    """A subscriber gets, in order, what is published after its start, without stale, repeated and malformed records."""
    publisher.embed("ann", 1)
    with EmbeddingSubscriber(publisher.bootstrap_servers, topic=publisher.topic) as subscriber:
        publisher.embed("ann", 5)
        publisher.embed("ann", 4)
        publisher.embed("ann", 5)
        publisher.send((b"ann", b"no vector", []))
        publisher.send(encode_tombstone(b"ann", 6))
        publisher.embed("ann", 7)
        assert read(subscriber, 3) == [("ann", 5), ("ann", -1), ("ann", 7)]
        assert (subscriber.stale, subscriber.repeated, subscriber.malformed) == (1, 1, 1)


def test_a_table_is_what_the_topic_holds(publisher: Publisher) -> None:
    """The table holds the newest embedding of each user of all partitions, no forgotten ones; then changes follow."""
    for number in range(20):
        publisher.embed(f"user-{number}", number)
        publisher.embed(f"user-{number}", number + 100)
    publisher.send(encode_tombstone(b"user-3", 300))
    with EmbeddingSubscriber(publisher.bootstrap_servers, topic=publisher.topic, from_beginning=True) as subscriber:
        table = subscriber.table()
        assert {user: one.metadata.source_offset for user, one in table.items()} == {
            f"user-{number}": number + 100 for number in range(20) if number != 3
        }
        assert table["user-7"].vector.tolist() == [107.0, 107.0, 107.0]
        publisher.embed("user-3", 301)
        assert read(subscriber, 1) == [("user-3", 301)]


def test_an_empty_topic_is_an_empty_table(publisher: Publisher) -> None:
    """The table of an empty topic is returned at once."""
    with EmbeddingSubscriber(publisher.bootstrap_servers, topic=publisher.topic, from_beginning=True) as subscriber:
        assert subscriber.table() == {}


def test_readers_share_users_by_partition(publisher: Publisher) -> None:
    """Readers of one partition each have all users between them, and no user twice."""
    for number in range(20):
        publisher.embed(f"user-{number}", number)
    parts = []
    for partition in (0, 1):
        with EmbeddingSubscriber(
            publisher.bootstrap_servers, topic=publisher.topic, from_beginning=True, partitions=[partition]
        ) as subscriber:
            parts.append(set(subscriber.table()))
    assert all(parts)
    assert len(parts[0]) + len(parts[1]) == len(parts[0] | parts[1]) == 20


def test_what_does_not_exist_is_named(publisher: Publisher) -> None:
    """A missing topic, a missing partition and an address without a broker are errors of one line that name them."""
    with pytest.raises(StreamformerError, match="nowhere does not exist"):
        EmbeddingSubscriber(publisher.bootstrap_servers, topic="nowhere")
    with pytest.raises(StreamformerError, match=r"has the partitions \[0, 1\]"):
        EmbeddingSubscriber(publisher.bootstrap_servers, topic=publisher.topic, partitions=[2])
    with pytest.raises(BrokerUnreachable, match=r"no broker answers at 127\.0\.0\.1:1"):
        EmbeddingSubscriber("127.0.0.1:1")


def tail(publisher: Publisher, *options: str, topic: str = "EMBEDDINGS") -> subprocess.Popen[str]:
    """Start `streamformer tail`."""
    command = [sys.executable, "-m", "infra.cli", "tail", "--bootstrap-servers", publisher.bootstrap_servers, *options]
    environment = {f"STREAMFORMER_TOPICS_{topic}": publisher.topic, "PATH": "/usr/bin:/bin"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_tail_prints_lines_of_json(publisher: Publisher) -> None:
    """Each line of `--json` is an object with the whole vector, and `--count` ends the command."""
    publisher.embed("ann", 5)
    publisher.embed("ann", 6)
    out, error = tail(publisher, "--from-beginning", "--json", "--count", "2").communicate(timeout=30)
    assert error == ""
    assert [json.loads(line)["vector"] for line in out.splitlines()] == [[5.0] * 3, [6.0] * 3]


def test_tail_prints_plain_lines_without_a_terminal(publisher: Publisher) -> None:
    """Lines in a pipe hold no colour codes, and a user id cannot inject any."""
    publisher.embed("ann\x1b[31m", 5)
    publisher.send(encode_tombstone(b"bob", 6))
    out, error = tail(publisher, "--from-beginning", "--count", "2").communicate(timeout=30)
    assert error == ""
    assert "\x1b" not in out
    assert sorted(out.splitlines()) == [
        "22:13:20.000  ann\\x1b[31m  every_n  5 actions  v1  [+5.000 +5.000 +5.000]",
        "bob  forgotten  offset 6",
    ]


@pytest.mark.usefixtures("default_signals")
def test_tail_ends_quietly(publisher: Publisher) -> None:
    """Ctrl-C ends the command with exit code 0 and nothing on standard error."""
    publisher.embed("ann", 5)
    process = tail(publisher, "--from-beginning")
    assert process.stdout is not None
    assert "ann" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=10)[1], process.returncode) == ("", 0)


def test_tail_survives_a_closed_pipe(publisher: Publisher) -> None:
    """The command ends without a traceback when the reader of its lines ends."""
    publisher.embed("ann", 5)
    process = tail(publisher, "--from-beginning")
    assert process.stdout is not None
    assert "ann" in process.stdout.readline()
    process.stdout.close()
    publisher.embed("ann", 6)
    assert process.wait(timeout=10) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_tail_reports_a_bad_address_in_one_line(publisher: Publisher) -> None:
    """At an address without a broker the command ends with exit code 1 and one line, without a traceback."""
    publisher.bootstrap_servers = "127.0.0.1:1"
    process = tail(publisher)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "")
    assert error.startswith("error: no broker answers at 127.0.0.1:1")
    assert len(error.splitlines()) == 1


def test_tombstones_are_changes(publisher: Publisher) -> None:
    """A forgotten user arrives as a tombstone with its offset."""
    publisher.send(encode_tombstone(b"ann", 6))
    with EmbeddingSubscriber(publisher.bootstrap_servers, topic=publisher.topic, from_beginning=True) as subscriber:
        assert next(iter(subscriber)) == Tombstone("ann", 6)
