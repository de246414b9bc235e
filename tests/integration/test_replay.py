"""A replay sends every event once, each user's in order, at the chosen pace, and reports when it cannot."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import closing
from threading import Thread, Timer
from typing import Any

import kafka
import numpy as np
import pyarrow as pa
import pytest
from kafka.structs import TopicPartition

from infra.datasets import replay as replay_module
from infra.datasets.event_log import EventLog, event_log
from infra.datasets.generator import GeneratorPolicy, generate
from infra.datasets.replay import Acknowledged, Pace, ReplayFailed, replay
from infra.kafka.broker import Broker
from infra.kafka.topics import ensure_topics
from streams.config.groups import KafkaSettings, TopicsSettings
from streams.config.settings import Settings

pytestmark = pytest.mark.broker

PARTITIONS = 3


@pytest.fixture
def settings(broker: Any, topic_prefix: str) -> Settings:
    """Create the topics of a test."""
    names = {name: f"{topic_prefix}-{name}" for name in ("actions", "embeddings", "dead_letter")}
    kafka_settings = KafkaSettings(bootstrap_servers=broker.bootstrap_servers)
    made = Settings(app_id=topic_prefix, kafka=kafka_settings, topics=TopicsSettings(**names, partitions=PARTITIONS))
    ensure_topics(made)
    return made


@pytest.fixture
def own_settings(settings: Settings) -> Iterator[tuple[Broker, Settings]]:
    """Start a broker that a test may kill, with the topics."""
    with Broker.start() as running:
        options = settings.kafka.model_copy(update={"bootstrap_servers": running.bootstrap_servers})
        made = settings.model_copy(update={"kafka": options})
        ensure_topics(made)
        yield running, made


@pytest.fixture
def log() -> EventLog:
    """Generate some thousand events, with late ones among them."""
    return event_log(generate(GeneratorPolicy(users=200, events=5_000), 11))


def test_every_event_once_and_each_user_in_order(settings: Settings, log: EventLog) -> None:
    """The topic holds exactly the log's records; those of one user are in one partition, in the log's order."""
    totals = asyncio.run(replay(log, settings, Pace()))
    assert totals.acknowledged == len(log)
    found = _by_user(record for records in _read(settings).values() for record in records)
    assert found == _by_user(log.records(np.arange(len(log))))


def test_acknowledged_offsets_are_those_of_the_records(settings: Settings, log: EventLog) -> None:
    """At the partition and offset that `on_acknowledged` reports, the topic holds the reported row."""
    batches: list[Acknowledged] = []
    asyncio.run(replay(log, settings, Pace(), on_acknowledged=batches.append))
    records = list(log.records(np.arange(len(log))))
    topic = _read(settings)
    for batch in batches:
        for i, row in enumerate(batch.rows.tolist()):
            assert topic[batch.partition][batch.base_offset + i] == records[row]
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(len(log)))


def test_clients_of_other_makes_send_a_user_to_the_same_partition(settings: Settings, log: EventLog) -> None:
    """The producer of kafka-python sends a user's events to the same partition as the replay."""
    asyncio.run(replay(log.head(300), settings, Pace()))
    with closing(kafka.KafkaProducer(**settings.kafka.client_options())) as producer:
        for key, value in log.records(np.arange(300, 600)):
            producer.send(settings.topics.actions, key=key, value=value)
    users = [{key for key, _ in records} for records in _read(settings).values()]
    assert sum(map(len, users)) == len(set.union(*users))


def test_rate_is_kept(settings: Settings, log: EventLog) -> None:
    """At 1,000 events per second 1,500 events take 1.5 s, no less."""
    totals = asyncio.run(replay(log.head(1_500), settings, Pace(rate=1_000)))
    print(f"{totals.seconds:.2f} s")
    assert 1.45 <= totals.seconds < 4


def test_stop_ends_it_with_everything_sent_acknowledged(settings: Settings, log: EventLog) -> None:
    """A stopped replay returns soon, and the topic holds exactly the events reported as acknowledged."""
    ends_s = time.monotonic() + 1
    totals = asyncio.run(replay(log, settings, Pace(rate=1_000), stop=lambda: time.monotonic() > ends_s))
    assert 0 < totals.acknowledged < len(log)
    assert sum(len(records) for records in _read(settings).values()) == totals.acknowledged


def test_missing_topic_is_one_clear_line(settings: Settings, log: EventLog) -> None:
    """A missing topic is reported in one line, with the number of events sent."""
    missing = settings.model_copy(update={"topics": settings.topics.model_copy(update={"actions": "no-such-topic"})})
    with pytest.raises(ReplayFailed, match="after 0 of 5,000 events") as caught:
        asyncio.run(replay(log, missing, Pace()))
    assert "\n" not in str(caught.value)


def test_broker_that_comes_back_costs_nothing(own_settings: tuple[Broker, Settings], log: EventLog) -> None:
    """Although the broker is killed and started again in the middle, every event is acknowledged and stored once."""
    broker, settings = own_settings

    def bounce() -> None:
        time.sleep(1)
        broker.kill()
        time.sleep(1)
        broker.restart()

    killer = Thread(target=bounce)
    killer.start()
    totals = asyncio.run(replay(log, settings, Pace(rate=1_000)))
    killer.join()
    assert totals.acknowledged == len(log)
    assert sum(len(records) for records in _read(settings).values()) == len(log)


def test_broker_that_stays_away_is_one_clear_line(
    own_settings: tuple[Broker, Settings], log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that does not come back ends the replay with the number of acknowledged events."""
    broker, settings = own_settings
    monkeypatch.setattr(replay_module, "ACKNOWLEDGE_S", 3.0)
    killer = Timer(1, broker.kill)
    killer.start()
    with pytest.raises(ReplayFailed, match="the replay ended after") as caught:
        asyncio.run(replay(log, settings, Pace(rate=1_000)))
    killer.join()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("speed", "elapsed_s", "due"), [(1, 0.999, 1), (1, 1.0, 3), (10, 0.1, 3), (1, 5.0, 4)])
def test_speed_follows_event_time(speed: float, elapsed_s: float, due: int) -> None:
    """An event is due when event time, at `speed`, has reached it; a late one is due with the row before it."""
    rows = {
        "user_id": list("abcd"),
        "item_id": list("abcd"),
        "action": ["view"] * 4,
        "timestamp_ms": [1_000, 2_000, 1_500, 6_000],
    }
    assert Pace(speed=speed).due(event_log(pa.table(rows)), elapsed_s) == due


def _read(settings: Settings) -> dict[int, list[tuple[bytes, bytes]]]:
    """Return every record of the actions topic, by partition, in offset order."""
    partitions = [TopicPartition(settings.topics.actions, number) for number in range(PARTITIONS)]
    with closing(kafka.KafkaConsumer(**settings.kafka.client_options(), auto_offset_reset="earliest")) as consumer:
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        held: dict[int, list[tuple[bytes, bytes]]] = {number: [] for number in range(PARTITIONS)}
        while any(consumer.position(partition) < ends[partition] for partition in partitions):
            for partition, records in consumer.poll(1_000).items():
                held[partition.partition] += [(record.key, record.value) for record in records]
    return held


def _by_user(records: Any) -> dict[bytes, list[str]]:
    by_user: dict[bytes, list[str]] = {}
    for key, value in records:
        by_user.setdefault(key, []).append(json.loads(value)["event_id"])
    return by_user
