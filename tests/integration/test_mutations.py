"""Real workers with one deliberate fault: sound workers survive trouble, and a broken defence is noticed.

The simulation does this for faults of core, codec and checkpoint (`tests/simulation/test_mutations.py`). Here are those
that need a broker, a disk or a process: dedupe by offset against a delivery that repeats, the position guard against
one that loses, the order of a checkpoint and of the last write of a store around a crash, and the end of a restore. A
broken end and a missing fence are also counted per start in `test_cold_starts.py`.

A fault is noticed when the checker finds a violation, or when the worker itself rejects its state.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka.errors import KafkaError

from infra.harness.deployment import Deployment, deploy
from infra.harness.events import Event, action, send
from infra.harness.run import Run
from infra.harness.supervisor import ABORTED
from tests.integration.broken_worker import BROKEN, TROUBLE, Fault, command, restore_ends_at_a_silence

pytestmark = [pytest.mark.broker, pytest.mark.slow]
ROUNDS = 5
ROUND_S = 0.6
"""Time in which the worker reads one round before the next is sent."""
ACTIONS = 10
EVENTS = ROUNDS * ACTIONS * 20
EARLY, LATE = [f"early-{number}" for number in range(20)], [f"late-{number}" for number in range(20)]
REST_S = 60.0
BROKEN_REST_S = 6.0
"""Shorter, because with a fault the run may never rest: an embedding that the model expects is never published."""


@pytest.fixture
def deployment(broker: Any, topic_prefix: str, tmp_path: Path) -> Deployment:
    """Return a deployment with two partitions."""
    return deploy(tmp_path, broker.bootstrap_servers, topic_prefix, {"topics": {"partitions": 2}})


def history(users: list[str], round_: int) -> list[Event]:
    """Return ten actions per user, more than a chunk, without event ids, so that only offsets reveal a repetition."""
    return [action(user, round_ * ACTIONS + number, event_id=None) for number in range(ACTIONS) for user in users]


def lived_through(deployment: Deployment, fault: Fault) -> Iterator[Run]:
    """Let early users act, then late ones, in rounds; the worker is started again whenever it ends."""
    with Run(deployment, command(fault, deployment.folder)) as run:
        send(deployment.settings, history(EARLY, 0))
        run.supervisor.scale(1)
        run.wait_until(lambda: committed_events(run) > 0 or bool(aborts(run)))
        if fault is restore_ends_at_a_silence:
            run.supervisor.hold(0)
            shutil.rmtree(deployment.data_dir(0))
            run.supervisor.start(0)
        for round_ in range(1, ROUNDS):
            send(deployment.settings, history(LATE, round_))
            run.rest(ROUND_S)
        yield run


def committed_events(run: Run) -> int:
    """Return the number of committed events; 0 while the broker has no coordinator for the group yet."""
    try:
        return sum(run.reader.committed().values())
    except KafkaError:
        return 0


def aborts(run: Run) -> list[str]:
    """Return the last log lines of workers that aborted, and those of partitions that lost records and are halted."""
    halted = [line for line in run.supervisor.log(0).splitlines() if " is halted, " in line and "changelog" in line]
    return halted + [end.last_line for end in run.supervisor.exits if end.code == ABORTED]


def found(run: Run, rest_s: float) -> list[str]:
    """Return the violations once every event is committed, or the last log lines of workers that aborted."""
    run.wait_until(lambda: committed_events(run) == EVENTS or bool(aborts(run)))
    if refused := aborts(run):
        return refused
    run.rest(rest_s)
    return [str(violation) for violation in run.judge().violations]


@pytest.mark.parametrize("fault", TROUBLE, ids=lambda fault: fault.__name__)
def test_trouble_is_survived(deployment: Deployment, fault: Fault) -> None:
    """A crash on either side of a commit, a delivery that repeats and one that loses break no invariant."""
    for run in lived_through(deployment, fault):
        assert found(run, REST_S) == []


@pytest.mark.parametrize("fault", BROKEN, ids=lambda fault: fault.__name__)
def test_fault_is_noticed(deployment: Deployment, fault: Fault) -> None:
    """The checker finds a violation, or the worker rejects its state, when this defence is broken."""
    for run in lived_through(deployment, fault):
        noticed = found(run, BROKEN_REST_S)
        print(noticed[:3])
        assert noticed
