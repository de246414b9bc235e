"""`streamformer send` on a real broker: what it sends is what a worker accepts, in the partition where it belongs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest
from aiokafka.partitioner import murmur2
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

from infra.kafka.broker import Broker, ExternalBroker
from streams.wire.actions import DecodeLimits, decode_actions

pytestmark = pytest.mark.broker
PARTITIONS = 3


def send(broker: Broker | ExternalBroker, topic: str, *arguments: str, stdin: str = "") -> Any:
    """Run the command and return the finished process."""
    return subprocess.run(
        [sys.executable, "-m", "infra.cli", "send", *arguments, "--bootstrap-servers", broker.bootstrap_servers],
        env={"STREAMFORMER_TOPICS_ACTIONS": topic, "PATH": "/usr/bin:/bin"},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def topic(broker: Broker | ExternalBroker, topic_prefix: str) -> str:
    """An empty topic of actions."""
    admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    admin.create_topics({topic_prefix: {"num_partitions": PARTITIONS, "replication_factor": 1}}, wait_for_metadata=True)
    admin.close()
    return topic_prefix


def read(broker: Broker | ExternalBroker, topic: str, count: int) -> list[Any]:
    """Return the first `count` records of the topic; fail after ten seconds."""
    consumer = KafkaConsumer(bootstrap_servers=broker.bootstrap_servers, auto_offset_reset="earliest", group_id=None)
    consumer.assign([TopicPartition(topic, partition) for partition in range(PARTITIONS)])
    records: list[Any] = []
    deadline = time.monotonic() + 10
    while len(records) < count and time.monotonic() < deadline:
        records += [record for batch in consumer.poll(timeout_ms=200).values() for record in batch]
    consumer.close()
    assert len(records) == count
    return records


def test_one_action_arrives_as_a_worker_reads_it(broker: Broker | ExternalBroker, topic: str) -> None:
    """The printed place holds a record that decodes to one action of the user, in the partition of murmur2."""
    process = send(broker, topic, "ann", "i-17", "--action", "buy", "--surface", "home", "--duration-ms", "9", "--json")
    assert (process.returncode, process.stderr) == (0, "")
    printed = json.loads(process.stdout)
    (record,) = read(broker, topic, 1)
    assert (printed["partition"], printed["offset"]) == (record.partition, record.offset)
    assert record.partition == (murmur2(b"ann") & 0x7FFFFFFF) % PARTITIONS
    decoded = decode_actions([record], now_ms=int(time.time() * 1_000), limits=DecodeLimits())
    assert (decoded.actions.users, decoded.rejected) == ([b"ann"], [])
    assert json.loads(record.value)["event_id"] == printed["event_id"]


def test_lines_of_many_users_arrive_in_their_order(broker: Broker | ExternalBroker, topic: str) -> None:
    """300 lines with one bad one among them: 299 records, each user's in order, every key in its partition."""
    lines = [
        json.dumps({"user_id": f"u-{n % 7}", "item_id": f"i-{n}", "action": "view", "timestamp_ms": 1_700_000_000_000})
        for n in range(299)
    ]
    process = send(broker, topic, "-", stdin="\n".join([*lines[:100], "{}", *lines[100:]]))
    assert (process.returncode, process.stdout) == (1, "299 sent, 1 rejected\n")
    assert process.stderr.startswith("line 101: rejected as field-missing")
    records = read(broker, topic, 299)
    assert all(one.partition == (murmur2(one.key) & 0x7FFFFFFF) % PARTITIONS for one in records)
    for user in range(7):
        values = [one.value.decode() for one in records if one.key == b"u-%d" % user]
        assert values == lines[user::7]


def test_a_missing_topic_is_one_line(broker: Broker | ExternalBroker) -> None:
    """Nothing is created by sending to a topic that does not exist: one line names it, exit code 1."""
    process = send(broker, "no-such-topic", "ann", "i-17")
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith("error: nowhere to send to: topic no-such-topic does not exist")
    assert len(process.stderr.splitlines()) == 1
