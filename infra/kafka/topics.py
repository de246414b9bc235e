"""The topics as data: create missing ones, verify existing ones, delete them.

The partition count of a topic decides which worker owns which user, and its cleanup policy decides whether state
survives. A topic with the wrong ones is therefore rejected, and never changed in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

import kafka
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError, TopicAlreadyExistsError

from infra.errors import InfraError
from infra.kafka.address import require_broker
from streams.config.settings import Settings
from streams.engine.cluster import partition_count_problem

DAY_MS = 86_400_000
ADMIN_TIMEOUT_MS = 30_000


class TopicMismatch(InfraError):
    """A topic is missing, or its partition count or cleanup policy is not the one that the code relies on."""


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as it has to be; `configs` holds the settings that differ from the broker's defaults."""

    name: str
    partitions: int
    cleanup_policy: Literal["delete", "compact"]
    configs: Mapping[str, str] = field(default_factory=dict)

    def creation(self, replication_factor: int) -> dict[str, Any]:
        """Return the topic in the form that kafka-python's `create_topics` takes."""
        return {
            "num_partitions": self.partitions,
            "replication_factor": replication_factor,
            "configs": {"cleanup.policy": self.cleanup_policy, **self.configs},
        }


def topics_of(settings: Settings) -> tuple[Topic, ...]:
    """Return every topic of the application; all have one partition count, so that a user has one partition."""
    names, partitions = settings.topics, settings.topics.partitions
    return (
        Topic(names.actions, partitions, "delete", {"retention.ms": str(7 * DAY_MS)}),
        Topic(names.embeddings, partitions, "compact", {"segment.ms": str(DAY_MS)}),
        Topic(names.dead_letter, partitions, "delete", _DEAD_LETTER_CONFIGS),
        Topic(settings.changelog_topic, partitions, "compact", _CHANGELOG_CONFIGS),
    )


# A rejected record is written whole, with more headers, so this topic accepts larger records than any other.
_DEAD_LETTER_CONFIGS: Mapping[str, str] = {
    "max.message.bytes": str(64 << 20),
    "retention.ms": str(30 * DAY_MS),
}

# The active segment is never compacted, so smaller segments limit how many outdated records a restore reads. A closed
# log is rewritten when half of it is outdated, which causes less disk traffic than the default once most keys are hot.
_CHANGELOG_CONFIGS: Mapping[str, str] = {
    "min.cleanable.dirty.ratio": "0.5",
    "segment.bytes": str(128 << 20),
    "segment.ms": str(DAY_MS),
}


def ensure_topics(settings: Settings, *, replication_factor: int = 1) -> list[str]:
    """Create the missing topics, verify all of them, and return the names of those created.

    Raises `TopicMismatch` when a topic has another shape, and `BrokerFailed` when no broker responds.
    """
    topics = topics_of(settings)
    with closing(_admin(settings)) as admin:
        existing = set(_asked(admin.list_topics))
        missing = [topic for topic in topics if topic.name not in existing]
        if missing:
            _create(admin, missing, replication_factor)
        _verify(admin, topics)
    return [topic.name for topic in missing]


def verify_topics(settings: Settings) -> None:
    """Raise `TopicMismatch`, with every difference and its remedy, unless all topics are as they must be."""
    with closing(_admin(settings)) as admin:
        _verify(admin, topics_of(settings))


def delete_topics(settings: Settings) -> None:
    """Delete the application's topics with their records; missing ones are ignored."""
    with closing(_admin(settings)) as admin:
        present = set(_asked(admin.list_topics))
        names = [topic.name for topic in topics_of(settings) if topic.name in present]
        if names:
            _asked(admin.delete_topics, names)


def _admin(settings: Settings) -> kafka.KafkaAdminClient:
    options = settings.kafka.client_options()
    require_broker(options)
    return kafka.KafkaAdminClient(request_timeout_ms=ADMIN_TIMEOUT_MS, **options)


def _create(admin: kafka.KafkaAdminClient, topics: Sequence[Topic], replication_factor: int) -> None:
    wanted = {topic.name: topic.creation(replication_factor) for topic in topics}
    try:
        admin.create_topics(wanted, wait_for_metadata=True)
    except TopicAlreadyExistsError:
        admin.wait_for_topics(
            list(wanted), timeout_ms=ADMIN_TIMEOUT_MS
        )  # another process created them; they are verified next
    except KafkaError as error:
        raise InfraError(
            "cannot create topics",
            f"{', '.join(wanted)}: {error}",
            "check the broker's log and this user's permissions",
        ) from error


def _verify(admin: kafka.KafkaAdminClient, topics: Sequence[Topic]) -> None:
    names = [topic.name for topic in topics]
    described = {one["name"]: one for one in _asked(admin.describe_topics, names)}
    present = [name for name in names if described.get(name, {}).get("partitions")]
    resources = [ConfigResource(ConfigResourceType.TOPIC, name, None) for name in present]
    configs = _asked(admin.describe_configs, resources, config_filter="all").get("topic", {}) if resources else {}
    problems = [
        problem
        for topic in topics
        for problem in _differences(topic, len(described.get(topic.name, {}).get("partitions", ())), configs)
    ]
    if problems:
        raise TopicMismatch(
            "topics do not match the settings",
            " | ".join(problems),
            "stop the workers and change the topics, or the settings",
        )


def _differences(topic: Topic, partitions: int, configs: Mapping[str, Any]) -> list[str]:
    """Return each difference of one existing topic, with its remedy."""
    if not partitions:
        return [f"{topic.name} is missing: create it with `streamformer topics create`"]
    problems = []
    if partitions != topic.partitions:
        problems.append(partition_count_problem(topic.name, partitions, topic.partitions))
    policy = configs[topic.name]["cleanup.policy"]["value"]
    if policy != topic.cleanup_policy:
        problems.append(
            f"{topic.name} has cleanup.policy={policy} and needs {topic.cleanup_policy}: alter it with "
            f"`kafka-configs.sh --alter --entity-type topics --entity-name {topic.name} "
            f"--add-config cleanup.policy={topic.cleanup_policy}`"
        )
    return problems


def _asked(method: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the result of an admin call; raise a failure of the broker as one line."""
    try:
        return method(*args, **kwargs)
    except KafkaError as error:
        raise InfraError("the broker rejected a request about topics", str(error), "check the broker's log") from error
