"""The output and dead-letter topics refuse, shrink and lose their leaders under a real worker, which goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kafka
import pytest
from kafka.admin import NewTopic

from infra.chaos.fault_context import set_topic_config
from infra.harness.deployment import Deployment, deploy
from infra.harness.events import Event, action, partition_of, send
from infra.harness.run import Run
from infra.harness.supervisor import CANNOT_START
from infra.harness.worker_process import sample
from infra.kafka.cluster import SIZE, Cluster
from infra.kafka.topics import TopicMismatch
from streams.engine.dead_letters import VALUE_OMITTED

pytestmark = [pytest.mark.broker, pytest.mark.slow]
USERS = [f"user-{number}" for number in range(40)]
LIMIT = "max.message.bytes"


@pytest.fixture
def deployment(broker: Any, topic_prefix: str, tmp_path: Path) -> Deployment:
    """Return a deployment with tight limits on dead letters in flight."""
    overrides = {"output": {"dead_letters_max": 400, "dead_letter_bytes_max": 4 << 20}}
    return deploy(tmp_path, broker.bootstrap_servers, topic_prefix, overrides)


@pytest.fixture
def run(deployment: Deployment) -> Iterator[Run]:
    """Yield a run whose workers are not started yet."""
    with Run(deployment) as run:
        yield run


def alter(run: Run, topic: str, limit: int) -> None:
    """Change the size limit of a topic."""
    set_topic_config(run.deployment.settings.kafka.bootstrap_servers, topic, {LIMIT: str(limit)})


def newest(run: Run) -> dict[bytes, int]:
    """Return the sequence length in each user's last embedding."""
    outputs = run.reader.read_all(run.deployment.settings.topics.embeddings)
    return {each.key or b"": int(dict(each.headers)["sequence-length"]) for each in outputs}


def are_published(run: Run, users: list[str], length: int) -> bool:
    """Return whether the last embedding of every user contains that many actions."""
    last = newest(run)
    return all(last.get(user.encode()) == length for user in users)


def metric(run: Run, name: str, labels: str = "") -> float:
    """Return a metric of worker 0, summed over its labels."""
    return sample(run.supervisor.page(0, "/metrics")[1], name, labels)


def test_a_topic_that_refuses_for_a_while_is_published_to_again(run: Run) -> None:
    """While `user-embeddings` refuses, the worker is live and not ready; seconds later everybody is published."""
    settings = run.deployment.settings
    send(settings, [action(user, 1) for user in USERS])
    run.supervisor.scale(1)
    run.wait_until(lambda: are_published(run, USERS, 1))
    begun_ms = time.time_ns() // 1_000_000
    alter(run, settings.topics.embeddings, 10)
    send(settings, [action(user, 2) for user in USERS])
    run.wait_until(lambda: run.supervisor.page(0, "/readyz")[0] == 503, 12)
    assert "are not acknowledged for" in run.supervisor.page(0, "/readyz")[1]
    assert run.supervisor.page(0, "/livez")[0] == 200
    assert metric(run, "streamformer_output_unacknowledged_seconds") > 5
    alter(run, settings.topics.embeddings, 1_048_588)
    healed_at = time.monotonic()
    run.wait_until(lambda: are_published(run, USERS, 2), 10)
    print(f"published {time.monotonic() - healed_at:.1f} s after the topic accepted records again")
    run.wait_until(run.supervisor.is_ready, 5)
    run.explain(begun_ms)
    assert run.rest(60)
    assert [str(violation) for violation in run.judge().violations] == []
    assert not run.supervisor.exits


def rejected(number: int, size: int = 20) -> Event:
    """Return a record that is not JSON."""
    return USERS[number % len(USERS)].encode(), b"%d:" % number + b"x" * size


def test_a_flood_of_bad_records_is_bounded_and_committed(run: Run) -> None:
    """20,000 bad records in a row, some too large for their topic, become as many dead letters and are committed."""
    settings, count = run.deployment.settings, 20_000
    alter(run, settings.topics.dead_letter, 100_000)
    send(settings, [rejected(number, 150_000 if number % 2_000 == 9 else 20) for number in range(count)])
    run.supervisor.scale(1)
    run.wait_until(lambda: sum(run.reader.committed().values()) == count, 60)
    letters = run.reader.read_all(settings.topics.dead_letter)
    places = {(dict(each.headers)["source-partition"], dict(each.headers)["source-offset"]) for each in letters}
    assert (len(letters), len(places)) == (count, count)
    assert sum(VALUE_OMITTED in dict(each.headers) for each in letters) == count // 2_000
    assert metric(run, "streamformer_dead_letters_shortened_total") == count // 2_000
    assert not run.supervisor.exits


def test_dead_letters_that_are_not_accepted_hold_their_events_and_nothing_else(run: Run) -> None:
    """While the dead-letter topic refuses everything, good events are published, and bad ones are not committed."""
    settings = run.deployment.settings
    run.supervisor.scale(1)
    run.wait_until(run.supervisor.is_ready)
    alter(run, settings.topics.dead_letter, 1)
    send(settings, [rejected(0)])
    partition = partition_of(USERS[0].encode(), 4)
    run.wait(1)
    send(settings, [action(user, 1) for user in USERS])
    run.wait_until(lambda: are_published(run, USERS, 1), 10)
    alter(run, settings.topics.dead_letter, 1_048_588)
    run.wait_until(lambda: run.reader.committed().get(partition, 0) == run.reader.ends()[partition], 20)
    assert not run.supervisor.exits


def test_batches_follow_the_limits_of_their_topics(run: Run) -> None:
    """With topics that take 20 kB at a time, thousands of users are published and committed without a refusal."""
    settings, users = run.deployment.settings, [f"user-{number}" for number in range(3_000)]
    for topic in (settings.topics.embeddings, settings.changelog_topic, settings.topics.dead_letter):
        alter(run, topic, 20_000)
    send(settings, [action(user, 1) for user in users])
    run.supervisor.scale(1)
    run.wait_until(lambda: are_published(run, users, 1), 60)
    assert run.rest(60)
    assert metric(run, "streamformer_publish_failures_total") == 0
    assert metric(run, "streamformer_checkpoint_failures_total") == 0
    assert [str(violation) for violation in run.judge().violations] == []


@pytest.mark.parametrize("which", ["embeddings", "changelog"])
def test_a_topic_that_takes_no_record_is_named_before_work_begins(run: Run, which: str) -> None:
    """A worker whose largest record does not fit into a topic ends with one line and without reading anything."""
    settings = run.deployment.settings
    topic = settings.topics.embeddings if which == "embeddings" else settings.changelog_topic
    alter(run, topic, 200)
    run.supervisor.scale(1)
    run.supervisor.workers[0].wanted = False
    run.wait_until(lambda: bool(run.supervisor.exits))
    (end,) = run.supervisor.exits
    assert end.code == CANNOT_START
    assert end.last_line.startswith(f"error: {topic} accepts records of at most 200 bytes")


def test_partitions_without_a_leader_wait_and_the_others_go_on(topic_prefix: str, tmp_path: Path) -> None:
    """Output and dead-letter partitions lose their only replica for 25 s: their users wait, all others do not."""
    with Cluster.start() as cluster:
        _create_unreplicated(cluster, topic_prefix)
        with Run(_deploy(tmp_path, cluster, topic_prefix)) as run:
            settings = run.deployment.settings
            topics = settings.topics
            send(settings, [action(user, 1) for user in USERS])
            run.supervisor.scale(1)
            run.wait_until(lambda: are_published(run, USERS, 1))
            broker = cluster.leader(topics.embeddings, 0)
            gone = {number for number in range(4) if cluster.leader(topics.embeddings, number).id == broker.id}
            without_letters = {number for number in range(4) if cluster.leader(topics.dead_letter, number) is broker}
            broker.kill()
            stopped_at = time.monotonic()
            send(settings, [action(user, 2) for user in USERS] + [rejected(number) for number in range(40)])
            others = [user for user in USERS if partition_of(user.encode(), 4) not in gone | without_letters]
            print(f"without a leader: {gone}, {without_letters}; users of other partitions: {len(others)}")
            run.wait_until(lambda: _outputs_of(run, gone, others, 2), 20)
            run.wait_until(lambda: run.supervisor.page(0, "/readyz")[0] == 503, 12)
            run.wait(max(0.0, stopped_at + 25 - time.monotonic()))
            assert run.supervisor.page(0, "/livez")[0] == 200
            broker.restart()
            run.wait_until(lambda: are_published(run, USERS, 2), 20)
            run.wait_until(run.supervisor.is_ready, 20)
            assert not run.supervisor.exits


def _deploy(folder: Path, cluster: Cluster, prefix: str) -> Deployment:
    """Deploy on three brokers; new topics take a moment to be known to all of them."""
    try:
        return deploy(folder, cluster.bootstrap_servers, prefix, brokers=SIZE)
    except TopicMismatch:
        time.sleep(3)
        return deploy(folder, cluster.bootstrap_servers, prefix, brokers=SIZE)


def _create_unreplicated(cluster: Cluster, prefix: str) -> None:
    admin = kafka.KafkaAdminClient(bootstrap_servers=cluster.bootstrap_servers)
    alone = {"min.insync.replicas": "1"}
    admin.create_topics(
        [
            NewTopic(f"{prefix}-out", 4, 1, topic_configs={"cleanup.policy": "compact", **alone}),
            NewTopic(f"{prefix}-dead", 4, 1, topic_configs={"cleanup.policy": "delete", **alone}),
        ]
    )
    admin.close()


def _outputs_of(run: Run, gone: set[int], users: list[str], length: int) -> bool:
    """Return whether users are published, by the partitions that have a leader; the reader waits for no other."""
    topic = run.deployment.settings.topics.embeddings
    consumer = kafka.KafkaConsumer(bootstrap_servers=run.deployment.settings.kafka.bootstrap_servers)
    tps = [kafka.TopicPartition(topic, number) for number in range(4) if number not in gone]
    consumer.assign(tps)
    consumer.seek_to_beginning(*tps)
    last: dict[bytes, int] = {}
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        for records in consumer.poll(200).values():
            last |= {each.key: int(dict(each.headers)["sequence-length"]) for each in records}
    consumer.close()
    return all(last.get(user.encode()) == length for user in users)
