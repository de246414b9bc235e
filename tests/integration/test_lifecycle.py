"""The life of a worker: health during a restore and a stall, orderly and forced ends, all within bounds."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from infra.harness.deployment import Deployment, deploy
from infra.harness.events import Event, action, send
from infra.harness.run import Run
from infra.harness.supervisor import ABORTED, FORCED, STOPPED
from infra.harness.worker_process import WORKER, sample
from tests.integration.broken_worker import (
    Fault,
    blocks_the_loop,
    command,
    processes_nothing,
    restores_slowly,
    stops_for_ever,
)

pytestmark = [pytest.mark.broker, pytest.mark.slow]
PARTITIONS = 2
SESSION_MS = 6_000
ENDED_S = 60.0
HEARTBEAT_S = 2.0
"""Allowance: a session is counted from the last heartbeat, which is sent every second."""
SLACK_S = 10.0
"""Allowance for a busy machine on top of a bound."""
GAUGE_S = 5.0
"""Bound for a gauge to follow; the worker sets gauges once per second."""
Enter = Callable[..., Run]


@pytest.fixture
def enter(broker: Any, topic_prefix: str, tmp_path: Any) -> Any:
    """Return a function that starts a run with its own settings, and with a fault in its workers if one is named."""
    with ExitStack() as stack:

        def entered(fault: Fault | None = None, **groups: dict[str, Any]) -> Run:
            overrides = {"topics": {"partitions": PARTITIONS}, "kafka": {"session_timeout_ms": SESSION_MS}, **groups}
            deployment: Deployment = deploy(tmp_path, broker.bootstrap_servers, topic_prefix, overrides)
            started_with = command(fault, deployment.folder) if fault else WORKER
            return stack.enter_context(Run(deployment, started_with))

        yield entered


def some(count: int) -> list[Event]:
    """Return one action for each of `count` users."""
    return [action(f"user-{number}", number) for number in range(count)]


def metric(run: Run, name: str, number: int = 0) -> float:
    """Return the sum of a worker's metric over its labels."""
    return sample(run.supervisor.page(number, "/metrics")[1], name)


def ready_partitions(run: Run, number: int) -> float:
    """Return the number of partitions that a worker reports as ready."""
    return sample(run.supervisor.page(number, "/metrics")[1], "streamformer_partitions", 'state="ready"')


def ended(run: Run, number: int = 0) -> int:
    """Wait for a worker to end; return its exit code."""
    process = run.supervisor.workers[number].process
    assert process is not None
    return process.wait(ENDED_S)


def test_sigterm_leaves_nothing_to_replay(enter: Enter) -> None:
    """SIGTERM checkpoints everything that was processed and ends with 0 in time; the next start reads nothing again."""
    run = enter(
        checkpoint={"interval_ms": 600_000}, worker={"watchdog_timeout_ms": 700_000, "shutdown_timeout_ms": 15_000}
    )
    send(run.deployment.settings, some(300))
    run.supervisor.scale(1)
    run.wait_until(lambda: metric(run, "streamformer_events_total") == 300)
    assert not run.reader.committed()
    began_s = time.monotonic()
    run.supervisor.terminate(0)
    assert ended(run) == STOPPED
    assert time.monotonic() - began_s < 15 + SLACK_S
    assert sum(run.reader.committed().values()) == 300
    run.supervisor.tick()
    time.sleep(0.5)
    run.supervisor.tick()
    run.wait_until(run.supervisor.is_ready)
    time.sleep(2)
    assert metric(run, "streamformer_events_total") == 0


def test_stopping_is_bounded(enter: Enter) -> None:
    """A worker that cannot finish within worker.shutdown_timeout_ms ends with 71."""
    run = enter(stops_for_ever, worker={"shutdown_timeout_ms": 2_000})
    run.supervisor.scale(1)
    run.wait_until(run.supervisor.is_ready)
    run.supervisor.terminate(0)
    began_s = time.monotonic()
    assert ended(run) == FORCED
    assert 1.5 < time.monotonic() - began_s < 2 + SLACK_S


def test_a_second_signal_forces(enter: Enter) -> None:
    """A second SIGTERM ends a worker that is stopping at once, with 71."""
    run = enter(stops_for_ever, worker={"shutdown_timeout_ms": 600_000})
    run.supervisor.scale(1)
    run.wait_until(run.supervisor.is_ready)
    run.supervisor.terminate(0)
    run.wait_until(lambda: "stopping: draining" in run.supervisor.log(0))
    run.supervisor.terminate(0)
    began_s = time.monotonic()
    assert ended(run) == FORCED
    assert time.monotonic() - began_s < SLACK_S
    assert "second signal" in run.supervisor.log(0)


def test_a_standstill_ends_the_worker(enter: Enter) -> None:
    """A worker that has records and does not process them ends with 70 and logs what is stalled."""
    run = enter(processes_nothing, worker={"watchdog_timeout_ms": 3_000})
    send(run.deployment.settings, some(50))
    run.supervisor.scale(1)
    assert ended(run) == ABORTED
    assert re.search(r"stopping: no progress for 3 s: .*processing of partition", run.supervisor.log(0))


def test_health_during_a_restore(enter: Enter) -> None:
    """While partitions are restored a worker is live and not ready, and reports how many; then it is ready."""
    run = enter(restores_slowly)
    run.supervisor.scale(1)
    run.wait_until(lambda: run.supervisor.page(0, "/readyz") == (503, f"{PARTITIONS} partitions are being restored\n"))
    assert run.supervisor.page(0, "/livez")[0] == 200
    assert ready_partitions(run, 0) == 0
    run.wait_until(run.supervisor.is_ready)
    assert run.supervisor.page(0, "/livez")[0] == 200
    run.wait_until(lambda: ready_partitions(run, 0) == PARTITIONS, GAUGE_S)


def test_health_of_a_blocked_event_loop(enter: Enter) -> None:
    """`/livez` reports a blocked event loop, because the server has its own threads."""
    run = enter(blocks_the_loop, worker={"watchdog_timeout_ms": 2_000})
    run.supervisor.scale(1)
    run.wait_until(run.supervisor.is_ready)
    send(run.deployment.settings, some(10))
    pages: list[tuple[int, str]] = []

    def is_not_live() -> bool:
        pages.append(run.supervisor.page(0, "/livez"))
        return pages[-1][0] == 503

    run.wait_until(is_not_live)
    assert re.fullmatch(r"the event loop has been blocked for [2-9] s\n", pages[-1][1])


def test_a_restart_moves_no_partition(enter: Enter) -> None:
    """A worker that returns within its session keeps its partitions, and the other worker's are untouched."""
    run = enter(kafka={"session_timeout_ms": 60_000, "heartbeat_interval_ms": 1_000})
    run.supervisor.scale(2)
    run.wait_until(lambda: ready_partitions(run, 0) + ready_partitions(run, 1) == PARTITIONS)
    run.wait_until(lambda: ready_partitions(run, 0) == ready_partitions(run, 1) == 1)
    acquired = run.supervisor.log(1).count("is ready at offset")
    run.supervisor.terminate(0)
    assert ended(run) == STOPPED
    run.supervisor.tick()
    time.sleep(0.5)
    run.supervisor.tick()
    run.wait_until(lambda: ready_partitions(run, 0) == 1)
    assert ready_partitions(run, 1) == 1
    assert run.supervisor.log(1).count("is ready at offset") == acquired


def test_a_worker_that_stops_for_good_hands_over_when_its_session_ends(enter: Enter) -> None:
    """SIGTERM does not leave the group: other workers take over after kafka.session_timeout_ms, not at once."""
    run = enter()
    run.supervisor.scale(2)
    run.wait_until(lambda: ready_partitions(run, 0) == ready_partitions(run, 1) == 1)
    began_s = time.monotonic()
    run.supervisor.scale(1)
    assert ended(run, 1) == STOPPED
    run.wait_until(lambda: ready_partitions(run, 0) == PARTITIONS)
    assert SESSION_MS / 1_000 - HEARTBEAT_S < time.monotonic() - began_s < SESSION_MS / 1_000 + 2 * SLACK_S
