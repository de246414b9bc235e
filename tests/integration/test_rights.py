"""A broker with access control: the least rights are enough, and each missing one is named in one line."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import kafka
import pytest
from kafka.admin import ACL, ACLOperation, ACLPermissionType, ACLResourcePatternType, ResourcePattern, ResourceType

from infra.harness.deployment import Deployment, deploy
from infra.harness.events import action, send
from infra.harness.supervisor import ABORTED, PORT
from infra.harness.topic_reader import HistoryReader
from infra.harness.worker_process import WORKER, Process, Program, environment, fetch_page, running
from infra.kafka.broker import Broker
from infra.kafka.node import BrokerOptions
from infra.kafka.topics import RightsMissing, verify_topics
from streams.config.groups import KafkaSettings
from streams.config.settings import Settings

pytestmark = [pytest.mark.broker, pytest.mark.slow]
USER, PASSWORD = "worker", "secret"
Right = tuple[ResourceType, str, ACLOperation]
PATIENCE_S = 40.0


@pytest.fixture(scope="module")
def guarded() -> Iterator[Broker]:
    """Yield a broker on which one user has only the rights that it is granted."""
    with Broker.start(BrokerOptions(users={USER: PASSWORD})) as broker:
        yield broker


@pytest.fixture
def deployment(guarded: Broker, topic_prefix: str, tmp_path: Path) -> Deployment:
    """Return an application whose topics a super user has created."""
    return deploy(tmp_path, guarded.bootstrap_servers, topic_prefix, {"topics": {"partitions": 2}})


def least_rights(settings: Settings) -> dict[str, Right]:
    """Return the rights that docs/guides/deploy.md lists, by a name for each."""
    names, topic = settings.topics, ResourceType.TOPIC
    return {
        "READ actions": (topic, names.actions, ACLOperation.READ),
        "READ embeddings": (topic, names.embeddings, ACLOperation.READ),
        "WRITE embeddings": (topic, names.embeddings, ACLOperation.WRITE),
        "READ changelog": (topic, settings.changelog_topic, ACLOperation.READ),
        "WRITE changelog": (topic, settings.changelog_topic, ACLOperation.WRITE),
        "WRITE dead letters": (topic, names.dead_letter, ACLOperation.WRITE),
        "READ group": (ResourceType.GROUP, settings.app_id, ACLOperation.READ),
        "WRITE transactions": (ResourceType.TRANSACTIONAL_ID, settings.app_id, ACLOperation.WRITE),
    }


def grant(broker: Broker, rights: Iterable[Right]) -> None:
    """Grant rights to the user and wait until they apply; a transactional id stands for all that begin with it."""
    acls: list[ACL] = []
    for kind, name, operation in rights:
        prefixed = kind is ResourceType.TRANSACTIONAL_ID
        pattern = ACLResourcePatternType.PREFIXED if prefixed else ACLResourcePatternType.LITERAL
        resource = ResourcePattern(kind, name, pattern)
        acls.append(ACL(f"User:{USER}", "*", operation, ACLPermissionType.ALLOW, resource))
    with closing(kafka.KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)) as admin:
        admin.create_acls(acls)
        until_s = time.monotonic() + PATIENCE_S
        while not all(admin.describe_acls(acl)[0] for acl in acls):
            assert time.monotonic() < until_s
            time.sleep(0.05)


def credentials(broker: Broker) -> dict[str, Any]:
    """Return the settings under which the user logs in."""
    return {
        "kafka.bootstrap_servers": broker.secured_servers,
        "kafka.security_protocol": "SASL_PLAINTEXT",
        "kafka.sasl_mechanism": "PLAIN",
        "kafka.sasl_username": USER,
        "kafka.sasl_password": PASSWORD,
    }


def settings_of_user(broker: Broker, settings: Settings) -> Settings:
    """Return the settings of the user."""
    values = {key.removeprefix("kafka."): value for key, value in credentials(broker).items()}
    return settings.model_copy(update={"kafka": KafkaSettings(**values)})


def program(broker: Broker, deployment: Deployment) -> Program:
    """Return a worker that logs in as the user."""
    variables = {**deployment.worker_environment(0), **environment(credentials(broker))}
    return Program((*WORKER, "--config", str(deployment.config)), deployment.folder / "worker.log", variables)


def page(process: Process, path: str) -> tuple[int, str]:
    """Return status and text of a page of the worker; (0, "") before it serves."""
    found = PORT.search(process.output())
    return fetch_page(int(found[2]), path) if found else (0, "")


def test_the_least_rights_are_enough(guarded: Broker, deployment: Deployment) -> None:
    """With the documented rights a worker reads, checkpoints and publishes; what it could not verify it says."""
    grant(guarded, least_rights(deployment.settings).values())
    with closing(HistoryReader(deployment.settings)) as reader, running(program(guarded, deployment)) as process:
        process.wait_until(lambda: page(process, "/readyz")[0] == 200, "readiness", PATIENCE_S)
        send(deployment.settings, [action(f"user-{number}", number) for number in range(20)])
        process.wait_until(lambda: sum(reader.committed().values()) == 20, "a checkpoint", PATIENCE_S)
        process.wait_until(lambda: len(reader.read_new().outputs) > 0, "an embedding", PATIENCE_S)
        time.sleep(2)
        process.require()
        assert "not verified: no right to read the settings of " in process.output()
        assert "grant DESCRIBE_CONFIGS" in process.output()
        assert "Traceback" not in process.output()


@pytest.mark.parametrize(
    "missing", ["READ actions", "READ embeddings", "WRITE embeddings", "WRITE changelog", "WRITE dead letters"]
)
def test_a_missing_right_on_a_topic_is_named_before_anything_is_done(
    missing: str, guarded: Broker, deployment: Deployment
) -> None:
    """A worker without a right on a topic does not start; one line names the right and the topic."""
    rights = least_rights(deployment.settings)
    _, topic, operation = rights.pop(missing)
    grant(guarded, rights.values())
    with pytest.raises(RightsMissing, match=rf"{operation.name} on {topic}") as caught:
        verify_topics(settings_of_user(guarded, deployment.settings), for_worker=True)
    assert "\n" not in str(caught.value)


def test_a_missing_right_on_the_group_is_named(guarded: Broker, deployment: Deployment) -> None:
    """A worker that may not join its group ends with one line that names the group and the right."""
    rights = least_rights(deployment.settings)
    del rights["READ group"]
    grant(guarded, rights.values())
    with running(program(guarded, deployment)) as process:
        assert process.wait(PATIENCE_S) == ABORTED
        last = process.output().splitlines()[-1]
    assert deployment.settings.app_id in last
    assert "grant READ" in last


def test_all_rights_leave_nothing_unverified(guarded: Broker, deployment: Deployment) -> None:
    """With DESCRIBE_CONFIGS as well, nothing is assumed."""
    settings = deployment.settings
    grant(guarded, least_rights(settings).values())
    topics = (settings.topics.actions, settings.topics.embeddings, settings.topics.dead_letter)
    described = (*topics, settings.changelog_topic)
    grant(guarded, [(ResourceType.TOPIC, name, ACLOperation.DESCRIBE_CONFIGS) for name in described])
    user = settings_of_user(guarded, settings)
    assert verify_topics(user).assumed == []
    assert len(verify_topics(user).weak) == 1
