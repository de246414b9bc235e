"""The topics as data: create missing ones, verify existing ones, delete them.

The partition count of a topic decides which worker owns which user, and its cleanup policy decides whether state
survives. A topic with the wrong ones is therefore rejected, and never changed in place.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

import kafka
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaConnectionError, KafkaError, NodeNotReadyError, TopicAlreadyExistsError

from infra.errors import InfraError
from infra.kafka.address import require_broker
from infra.kafka.durability import DAY_MS, INTERNAL_TOPICS, Findings, TopicFacts, findings
from streams.config.settings import Settings
from streams.engine.cluster import partition_count_problem

ADMIN_TIMEOUT_MS = 30_000
AWAY_S, AGAIN_S = 15.0, 0.2
"""Time for which a request is repeated whose broker is away, and the pause before it is."""
KNOWN_LOOKS = 3
"""Successive looks at which new topics must be known: each look may be answered by another broker."""
BROKERS_DEFAULT = -1
"""Replication factor that makes the broker apply its own `default.replication.factor`."""
CREATE = "streamformer topics create"
TOPIC_AUTHORIZATION_FAILED = 29
"""Error code of the broker: this user has no right to describe the topic."""


class TopicMismatch(InfraError):
    """A topic is missing, or its partition count or cleanup policy is not the one that the code relies on."""


class RightsMissing(InfraError):
    """This user has not the rights on a topic that a worker needs."""


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as it has to be; `configs` holds the settings that differ from the broker's defaults."""

    name: str
    partitions: int
    cleanup_policy: Literal["delete", "compact"]
    configs: Mapping[str, str] = field(default_factory=dict)
    rights: frozenset[str] = frozenset()
    """Rights that a worker needs; READ and WRITE include DESCRIBE."""
    command: str = CREATE
    """Command that creates the topic."""

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
    outputs = [
        Topic(name, partitions, "compact", {"segment.ms": str(DAY_MS)}, _READ | _WRITE, _command(settings, name))
        for name in settings.output_topics
    ]
    return (
        Topic(names.actions, partitions, "delete", _ACTIONS_CONFIGS, _READ),
        *outputs,
        Topic(names.dead_letter, partitions, "delete", _DEAD_LETTER_CONFIGS, _WRITE),
        Topic(settings.changelog_topic, partitions, "compact", _CHANGELOG_CONFIGS, _READ | _WRITE),
    )


def _command(settings: Settings, output: str) -> str:
    """Return the command that creates an output topic: with definitions, that of embeddings needs the release."""
    if output == settings.topics.features or settings.features.definitions_file is None:
        return CREATE
    return f"{CREATE} --release {shlex.quote(str(settings.encoder.release_dir))}"


_READ, _WRITE = frozenset({"READ"}), frozenset({"WRITE"})


# The broker's time of a record is its arrival time. A time of the producer would be as wrong as the producer's clock,
# also for retention and for the time of a deletion.
_ACTIONS_CONFIGS: Mapping[str, str] = {
    "message.timestamp.type": "LogAppendTime",
    "retention.ms": str(7 * DAY_MS),
}

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


def ensure_topics(settings: Settings, *, replication_factor: int = BROKERS_DEFAULT) -> list[str]:
    """Create the missing topics, verify all of them, and return the names of those created.

    Raises `TopicMismatch` when a topic has another shape, and `BrokerFailed` when no broker responds.
    """
    topics = topics_of(settings)
    with closing(_admin(settings)) as admin:
        existing = set(_asked(admin.list_topics))
        missing = [topic for topic in topics if topic.name not in existing]
        if missing:
            _create(admin, missing, replication_factor)
            _wait_known(admin, [topic.name for topic in missing])
        _verify(admin, topics)
    return [topic.name for topic in missing]


def _wait_known(admin: kafka.KafkaAdminClient, names: Sequence[str]) -> None:
    """Wait, within limits, until every broker that answers knows these topics: in a cluster they learn in turn."""
    deadline_s, known_looks = time.monotonic() + ADMIN_TIMEOUT_MS / 1000, 0
    while known_looks < KNOWN_LOOKS and time.monotonic() < deadline_s:
        described = _described(admin, names)
        is_known = all(described.get(name, {}).get("partitions") for name in names)
        known_looks = known_looks + 1 if is_known else 0
        time.sleep(0.05)


def verify_topics(settings: Settings, *, for_worker: bool = False) -> Findings:
    """Return what is weak or could not be verified about topics that are as they must be.

    Raises `TopicMismatch`, with every difference and its remedy, when they are not, and `RightsMissing` when this user
    may not describe them or, with `for_worker`, has not the rights that a worker needs.
    """
    with closing(_admin(settings)) as admin:
        topics = topics_of(settings)
        facts = _verify(admin, topics, require_rights=for_worker)
        return findings(settings, {**facts, **_facts(admin, _described(admin, INTERNAL_TOPICS))})


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


def _verify(
    admin: kafka.KafkaAdminClient, topics: Sequence[Topic], *, require_rights: bool = False
) -> dict[str, TopicFacts]:
    described = _described(admin, [topic.name for topic in topics])
    _require_rights(topics, described, all_of_them=require_rights)
    facts = _facts(admin, described)
    problems = [problem for topic in topics for problem in _differences(topic, facts.get(topic.name))]
    if problems:
        raise TopicMismatch(
            "topics do not match the settings",
            " | ".join(problems),
            "stop the workers and change the topics, or the settings",
        )
    return facts


def _described(admin: kafka.KafkaAdminClient, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in _asked(admin.describe_topics, list(names))}


def _facts(admin: kafka.KafkaAdminClient, described: Mapping[str, Mapping[str, Any]]) -> dict[str, TopicFacts]:
    """Return the facts about the topics that exist; configs are empty where this user may not read them."""
    present = {name: one["partitions"] for name, one in described.items() if one.get("partitions")}
    resources = [ConfigResource(ConfigResourceType.TOPIC, name, None) for name in present]
    answer = _asked(admin.describe_configs, resources, config_filter="all").get("topic", {}) if resources else {}
    return {
        name: TopicFacts(
            name,
            len(partitions),
            min(len(partition["replica_nodes"]) for partition in partitions),
            {key: entry["value"] for key, entry in answer.get(name, {}).items() if entry["value"] is not None},
        )
        for name, partitions in present.items()
    }


def _require_rights(topics: Sequence[Topic], described: Mapping[str, Mapping[str, Any]], *, all_of_them: bool) -> None:
    """Raise `RightsMissing` with every right that is missing; brokers before 2.3 do not report rights."""
    missing = []
    for topic in topics:
        one = described.get(topic.name, {})
        held = {str(getattr(each, "name", each)).upper() for each in one.get("authorized_operations") or ()}
        if one.get("error_code") == TOPIC_AUTHORIZATION_FAILED:
            missing.append(f"{' and '.join(sorted(topic.rights))} on {topic.name}")
        elif all_of_them and held and not held & {"ALL", "ANY"} and topic.rights - held:
            missing.append(f"{' and '.join(sorted(topic.rights - held))} on {topic.name}")
    if missing:
        raise RightsMissing("this user has not the rights that a worker needs", ", ".join(missing), "grant them")


def _differences(topic: Topic, found: TopicFacts | None) -> list[str]:
    """Return each difference of one topic, with its remedy; a cleanup policy that cannot be read is no difference."""
    if found is None:
        return [f"{topic.name} is missing: create it with `{topic.command}`"]
    problems = []
    if found.partitions != topic.partitions:
        problems.append(partition_count_problem(topic.name, found.partitions, topic.partitions))
    policy = found.configs.get("cleanup.policy", topic.cleanup_policy)
    if policy != topic.cleanup_policy:
        problems.append(
            f"{topic.name} has cleanup.policy={policy} and needs {topic.cleanup_policy}: alter it with "
            f"`kafka-configs.sh --alter --entity-type topics --entity-name {topic.name} "
            f"--add-config cleanup.policy={topic.cleanup_policy}`"
        )
    return problems


def _asked(method: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the result of an admin call; raise a failure of the broker as one line.

    A broker of a cluster that is away does not fail the call: the client turns to another one when it asks again.
    """
    deadline_s = time.monotonic() + AWAY_S
    while True:
        try:
            return method(*args, **kwargs)
        except (KafkaConnectionError, NodeNotReadyError) as error:
            if time.monotonic() >= deadline_s:
                raise InfraError(
                    "no broker answers a request about topics", str(error), "check that the brokers are up"
                ) from error
            time.sleep(AGAIN_S)
        except KafkaError as error:
            raise InfraError(
                "the broker rejected a request about topics", str(error), "check the broker's log"
            ) from error
