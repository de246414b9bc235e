"""Topics are created once, in the shape that the code relies on, and a wrong shape is refused with its remedy."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import kafka
import pytest

from infra import topics
from infra.errors import InfraError
from infra.kafka.broker import BrokerFailed
from infra.topics import Topic, TopicMismatch, ensure_topics, topics_of, verify_topics

pytestmark = pytest.mark.broker


@pytest.fixture
def bootstrap(broker: Any, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The shared broker, with the fixed topic names replaced by names of this test."""
    for name in ("USER_ACTIONS", "USER_EMBEDDINGS", "DEAD_LETTER"):
        monkeypatch.setattr(topics, name, f"{topic_prefix}-{getattr(topics, name)}")
    return str(broker.bootstrap_servers)


def test_creates_all_then_nothing(bootstrap: str, topic_prefix: str) -> None:
    """The first call creates every topic of the application, the second none, and both verify."""
    assert ensure_topics(bootstrap, topic_prefix, 3) == [topic.name for topic in topics_of(topic_prefix, 3)]
    assert ensure_topics(bootstrap, topic_prefix, 3) == []
    verify_topics(bootstrap, topic_prefix, 3)


def test_missing_topics_are_all_named(bootstrap: str, topic_prefix: str) -> None:
    """Verification of topics that do not exist names each of them and the command that creates them."""
    with pytest.raises(TopicMismatch, match="streamformer topics create") as caught:
        verify_topics(bootstrap, topic_prefix, 2)
    assert all(topic.name in str(caught.value) for topic in topics_of(topic_prefix, 2))


def test_wrong_partition_count_is_refused(bootstrap: str, topic_prefix: str) -> None:
    """Topics with another partition count than the settings are refused by creation and verification alike."""
    ensure_topics(bootstrap, topic_prefix, 3)
    for attempt in (ensure_topics, verify_topics):
        with pytest.raises(TopicMismatch, match="has 3 partitions where the settings say 4: set partitions to 3"):
            attempt(bootstrap, topic_prefix, 4)


@pytest.mark.parametrize("policy", ["delete", "compact,delete"])
def test_changelog_that_would_lose_state_is_refused(bootstrap: str, topic_prefix: str, policy: str) -> None:
    """A changelog that deletes by age is refused, with the command that mends it."""
    name = topics.changelog_topic(topic_prefix)
    _create(bootstrap, name, policy)
    with pytest.raises(TopicMismatch, match=r"--add-config cleanup\.policy=compact"):
        ensure_topics(bootstrap, topic_prefix, 2)


def test_no_broker_is_one_clear_line() -> None:
    """Without a broker the address is named in one line."""
    with pytest.raises(BrokerFailed, match=r"no Kafka broker answers at 127\.0\.0\.1:1") as caught:
        ensure_topics("127.0.0.1:1", "app", 2)
    assert "\n" not in str(caught.value)


def test_impossible_replication_is_one_clear_line(bootstrap: str, topic_prefix: str) -> None:
    """A replication factor above the number of brokers is reported with the broker's reason."""
    with pytest.raises(InfraError, match="cannot create topics") as caught:
        ensure_topics(bootstrap, topic_prefix, 2, replication_factor=3)
    assert "\n" not in str(caught.value)


def test_all_topics_have_one_partition_count() -> None:
    """Co-partitioning: every topic of an application has the same number of partitions."""
    assert {topic.partitions for topic in topics_of("app", 7)} == {7}


def _create(bootstrap: str, name: str, policy: str) -> None:
    topic = Topic(name, 2, "delete", {"cleanup.policy": policy})
    with closing(kafka.KafkaAdminClient(bootstrap_servers=bootstrap)) as admin:
        admin.create_topics({name: topic.creation(1)}, wait_for_metadata=True)
