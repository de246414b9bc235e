"""Topics are created once, in the shape that the code relies on; another shape is rejected, with its remedy."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import kafka
import pytest

from infra.errors import InfraError
from infra.kafka.address import BrokerFailed
from infra.kafka.topics import Topic, TopicMismatch, delete_topics, ensure_topics, topics_of, verify_topics
from streams.config.groups import KafkaSettings, TopicsSettings
from streams.config.settings import Settings

pytestmark = pytest.mark.broker


@pytest.fixture
def settings(broker: Any, topic_prefix: str) -> Settings:
    """Return settings with topics of three partitions that no other test uses."""
    return _settings(broker.bootstrap_servers, topic_prefix, 3)


def test_creates_all_then_nothing(settings: Settings) -> None:
    """The first call creates every topic of the application, the second none, and both verify."""
    assert ensure_topics(settings) == [topic.name for topic in topics_of(settings)]
    assert ensure_topics(settings) == []
    assert verify_topics(settings).inexact == []


def test_delete_takes_the_topics_of_the_settings_and_no_other(settings: Settings) -> None:
    """After a deletion the topics are gone, others stay, and a second deletion does nothing."""
    ensure_topics(settings)
    other = f"{settings.app_id}-other"
    _create(settings, other, "delete")
    delete_topics(settings)
    delete_topics(settings)
    with closing(kafka.KafkaAdminClient(**settings.kafka.client_options())) as admin:
        names = set(admin.list_topics())
    assert other in names
    assert not names & {topic.name for topic in topics_of(settings)}


def test_missing_topics_are_all_named(settings: Settings) -> None:
    """Verification names every missing topic and the command that creates it."""
    with pytest.raises(TopicMismatch, match="streamformer topics create") as caught:
        verify_topics(settings)
    assert all(f"{topic.name} is missing" in str(caught.value) for topic in topics_of(settings))


def test_wrong_partition_count_is_rejected(settings: Settings, topic_prefix: str) -> None:
    """Creation and verification both reject topics with another partition count than the settings."""
    ensure_topics(settings)
    for attempt in (ensure_topics, verify_topics):
        with pytest.raises(
            TopicMismatch, match=r"has 3 partitions where the settings say 4: set topics\.partitions to 3"
        ):
            attempt(_settings(settings.kafka.bootstrap_servers, topic_prefix, 4))


@pytest.mark.parametrize("policy", ["delete", "compact,delete"])
def test_changelog_that_would_lose_state_is_rejected(settings: Settings, policy: str) -> None:
    """A changelog that deletes by age is rejected, with the command that repairs it."""
    _create(settings, settings.changelog_topic, policy)
    with pytest.raises(TopicMismatch, match=r"--add-config cleanup\.policy=compact"):
        ensure_topics(settings)


def test_no_broker_is_one_clear_line() -> None:
    """Without a broker the address is named in one line."""
    with pytest.raises(BrokerFailed, match=r"no Kafka broker answers at 127\.0\.0\.1:1") as caught:
        ensure_topics(_settings("127.0.0.1:1", "app", 2))
    assert "\n" not in str(caught.value)


def test_impossible_replication_is_one_clear_line(settings: Settings) -> None:
    """A replication factor above the number of brokers is reported with the broker's reason."""
    with pytest.raises(InfraError, match="cannot create topics") as caught:
        ensure_topics(settings, replication_factor=3)
    assert "\n" not in str(caught.value)


def test_all_topics_have_one_partition_count() -> None:
    """Co-partitioning: every topic of an application has the same number of partitions."""
    assert {topic.partitions for topic in topics_of(_settings("127.0.0.1:1", "app", 7))} == {7}


def _settings(bootstrap_servers: str, prefix: str, partitions: int) -> Settings:
    names = {name: f"{prefix}-{name}" for name in ("actions", "embeddings", "dead_letter")}
    return Settings(
        app_id=prefix,
        kafka=KafkaSettings(bootstrap_servers=bootstrap_servers),
        topics=TopicsSettings(**names, partitions=partitions),
    )


def _create(settings: Settings, name: str, policy: str) -> None:
    topic = Topic(name, 3, "delete", {"cleanup.policy": policy})
    with closing(kafka.KafkaAdminClient(**settings.kafka.client_options())) as admin:
        admin.create_topics({name: topic.creation(1)}, wait_for_metadata=True)
