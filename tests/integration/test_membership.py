"""Life in a consumer group: spare workers, another host, two workers of one name, and a membership that is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from infra.harness.deployment import Deployment, deploy
from infra.harness.events import action, send
from infra.harness.run import Run
from infra.harness.supervisor import ABORTED, PORT, STOPPED, Supervisor
from infra.harness.worker_process import WORKER, Process, Program, fetch_page, sample
from streams.worker import DISPLACED
from tests.integration.broken_worker import (
    Fault,
    command,
    contradicts_its_assignment,
    has_another_url,
    is_idle_for_hours,
    is_on_another_host,
)

pytestmark = [pytest.mark.broker, pytest.mark.slow]
PARTITIONS = 2
READY_S = 40.0
Enter = Callable[..., Run]


@pytest.fixture
def enter(broker: Any, topic_prefix: str, tmp_path: Path) -> Iterator[Enter]:
    """Return a function that starts a run of two partitions, with a fault in its workers if one is named."""
    with ExitStack() as stack:

        def entered(fault: Fault | None = None) -> Run:
            deployment = deploy(
                tmp_path, broker.bootstrap_servers, topic_prefix, {"topics": {"partitions": PARTITIONS}}
            )
            return stack.enter_context(Run(deployment, command(fault, tmp_path) if fault else WORKER))

        yield entered


def ready(run: Run, number: int) -> float:
    """Return the number of ready partitions of a worker."""
    return sample(run.supervisor.page(number, "/metrics")[1], "streamformer_partitions", 'state="ready"')


def ended(run: Run, number: int = 0, timeout_s: float = 60.0) -> int:
    """Wait for a worker to end; return its exit code."""
    process = run.supervisor.workers[number].process
    assert process is not None
    return process.wait(timeout_s)


def test_a_spare_worker_is_ready_and_takes_over(enter: Enter) -> None:
    """With more workers than partitions every worker is ready, and the spare, however long idle, takes over."""
    run = enter(is_idle_for_hours)
    run.supervisor.scale(PARTITIONS + 1)
    run.wait_until(lambda: all(run.supervisor.is_ready(number) for number in range(PARTITIONS + 1)))
    owned: list[float] = []

    def is_spread() -> bool:
        """Return whether every worker but one owns a partition; the first to join owns both for a moment."""
        owned[:] = [ready(run, number) for number in range(PARTITIONS + 1)]
        return sorted(owned) == [0, 1, 1]

    run.wait_until(is_spread, READY_S)
    spare, owner = owned.index(0), owned.index(1)
    time.sleep(8)  # longer than a session: a spare that has left its group is forgotten by now
    run.supervisor.hold(owner)
    run.wait_until(lambda: ready(run, spare) == 1, 30)


@pytest.mark.parametrize(("before", "after"), [(WORKER, is_on_another_host), (has_another_url, None)])
def test_a_static_member_returns_from_another_host(enter: Enter, before: Any, after: Fault | None) -> None:
    """A worker that comes back under its instance id from another host, or as another version, is ready in seconds."""
    run = enter()
    supervisor = run.supervisor
    for fault in (None if before is WORKER else before, after):
        supervisor.command = command(fault, run.deployment.folder) if fault else WORKER
        supervisor.scale(1)
        supervisor.start(0)
        run.wait_until(lambda: ready(run, 0) == PARTITIONS, READY_S)
        send(run.deployment.settings, [action("ann", int(time.time()))])
        run.wait_until(lambda: sample(supervisor.page(0, "/metrics")[1], "streamformer_events_total") >= 1, READY_S)
        supervisor.retire(0)
        assert ended(run) == STOPPED
        supervisor.tick()


def test_of_two_workers_with_one_instance_id_the_displaced_one_ends(enter: Enter) -> None:
    """The worker that was there first ends with a line that names the setting; the other goes on undisturbed."""
    run = enter()
    run.supervisor.scale(1)
    run.wait_until(lambda: ready(run, 0) == PARTITIONS)
    run.supervisor.workers[0].wanted = False
    with_same_name = second(run.deployment)
    try:
        assert ended(run, timeout_s=30) == DISPLACED
        assert "give each worker its own worker.instance_id" in run.supervisor.output(0).splitlines()[-1]
        for _ in range(40):
            with_same_name.require()
            time.sleep(0.25)
        found = PORT.search(with_same_name.output())
        assert found is not None
        port = int(found[2])
        assert fetch_page(port, "/readyz")[0] == 200
        assert sample(fetch_page(port, "/metrics")[1], "streamformer_partitions", 'state="ready"') == PARTITIONS
    finally:
        with_same_name.kill()


def second(deployment: Deployment) -> Process:
    """Start a worker with the instance id of worker 0 and a disk of its own."""
    environment = {**deployment.worker_environment(0), "STREAMFORMER_DATA_DIR": str(deployment.folder / "second")}
    return Process.start(
        Program((*WORKER, "--config", str(deployment.config)), deployment.folder / "second.log", environment)
    )


def test_an_end_of_the_coordination_task_ends_the_worker(enter: Enter) -> None:
    """An exception inside aiokafka's coordination task ends the process with a line, instead of leaving it deaf."""
    run = enter(contradicts_its_assignment)
    supervisor: Supervisor = run.supervisor
    supervisor.scale(1)
    supervisor.workers[0].wanted = False
    assert ended(run, timeout_s=40) == ABORTED
    last = supervisor.output(0).splitlines()[-1]
    assert "the task that keeps the group membership has ended" in last
    assert "the assignment contradicts itself" in last


def test_a_worker_whose_session_has_ended_joins_again(enter: Enter) -> None:
    """A worker that was stopped for longer than its session is unknown to the group, joins again, and goes on."""
    run = enter()
    run.supervisor.scale(1)
    run.wait_until(lambda: ready(run, 0) == PARTITIONS)
    run.supervisor.pause(0)
    time.sleep(run.deployment.settings.kafka.session_timeout_ms / 1_000 + 3)
    run.supervisor.resume(0)
    send(run.deployment.settings, [action(f"user-{number}", number) for number in range(20)])
    run.wait_until(lambda: sum(run.reader.committed().values()) == 20, 30)
    assert run.supervisor.exits == []
