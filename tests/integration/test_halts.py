"""A fault of one partition, met by a real worker: that partition halts, and the others go on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.chaos.fault_context import delete_records, set_topic_config
from infra.harness.deployment import deploy
from infra.harness.events import action, partition_of, send
from infra.harness.run import Run
from infra.harness.worker_process import sample

pytestmark = [pytest.mark.broker, pytest.mark.slow]
USERS = [f"user-{number}" for number in range(40)]


@pytest.fixture
def run(broker: Any, topic_prefix: str, tmp_path: Path) -> Iterator[Run]:
    """Yield a run whose workers are not started yet."""
    with Run(deploy(tmp_path, broker.bootstrap_servers, topic_prefix)) as run:
        yield run


def published_by(run: Run, user: str) -> int:
    """Return how many embeddings of a user are in the output topic."""
    outputs = run.reader.read_all(run.deployment.settings.topics.embeddings)
    return sum(each.key == user.encode() for each in outputs)


def partitions(run: Run, state: str) -> float:
    """Return the number of partitions of worker 0 in a state."""
    return sample(run.supervisor.page(0, "/metrics")[1], "streamformer_partitions", f'state="{state}"')


def test_a_partition_that_lost_its_changelog_halts_alone(run: Run) -> None:
    """With an empty disk and a changelog cut in one partition, the worker serves the others and names that one."""
    settings = run.deployment.settings
    send(settings, [action(user, 1) for user in USERS])
    run.supervisor.scale(1)
    assert run.rest(60)
    run.supervisor.stop()
    servers, topic = settings.kafka.bootstrap_servers, settings.changelog_topic
    end = run.reader.ends(topic)[2]
    set_topic_config(servers, topic, {"cleanup.policy": "delete"})
    delete_records(servers, topic, {2: end})
    set_topic_config(servers, topic, {"cleanup.policy": "compact"})
    shutil.rmtree(run.deployment.data_dir(0))
    committed = run.reader.committed()
    run.supervisor.scale(1)
    send(settings, [action(user, 2) for user in USERS])
    others = [user for user in USERS if partition_of(user.encode(), 4) != 2]
    halted = [user for user in USERS if partition_of(user.encode(), 4) == 2]
    run.wait_until(lambda: all(published_by(run, user) == 2 for user in others))
    status, reason = run.supervisor.page(0, "/readyz")
    assert status == 503
    assert reason.startswith("partition 2 is halted: it cannot be acquired: the changelog")
    run.wait_until(lambda: (partitions(run, "halted"), partitions(run, "ready")) == (1, 3), 5)  # once a second
    assert [published_by(run, user) for user in halted] == [1] * len(halted)
    assert run.reader.committed()[2] == committed[2]
    assert not [each for each in run.supervisor.exits if not each.expected]
