"""The life of a worker: it tells the truth about its health, ends in order, within bounds, or the hard way."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from infra.bench.baselines.processes import sample
from infra.harness.deployment import Stage, set_up
from infra.harness.run import Trial
from infra.harness.supervisor import ABORTED, FORCED, STOPPED, WORKER
from tests.integration.broken_worker import (
    Fault,
    blocks_the_loop,
    command,
    processes_nothing,
    restores_slowly,
    stops_for_ever,
)
from tests.integration.trials import SOON_S, Sent, action, asked, is_ready, send, until

pytestmark = [pytest.mark.broker, pytest.mark.slow]
PARTITIONS = 2
SESSION_MS = 6_000
HEARTBEAT_S = 2.0
"""A session counts from the last heartbeat, which comes each second."""
SLACK_S = 10.0
"""What a busy machine may add to a bound."""
Enter = Callable[..., Trial]


@pytest.fixture
def enter(broker: Any, topic_prefix: str, tmp_path: Any) -> Any:
    """A trial with settings of its own, and a fault in its workers if one is named; closed after the test."""
    with ExitStack() as stack:

        def entered(fault: Fault | None = None, **groups: dict[str, Any]) -> Trial:
            overrides = {"topics": {"partitions": PARTITIONS}, "kafka": {"session_timeout_ms": SESSION_MS}, **groups}
            stage: Stage = set_up(tmp_path, broker.bootstrap_servers, topic_prefix, overrides)
            started_with = command(fault, stage.folder) if fault else WORKER
            return stack.enter_context(Trial(stage, started_with))

        yield entered


def some(count: int) -> list[Sent]:
    return [action(f"user-{number}", number) for number in range(count)]


def metric(trial: Trial, name: str, number: int = 0) -> float:
    return sample(asked(trial, "/metrics", number)[1], name)


def ready_partitions(trial: Trial, number: int) -> float:
    lines = asked(trial, "/metrics", number)[1].splitlines()
    return sample("\n".join(line for line in lines if 'state="ready"' in line), "streamformer_partitions")


def ended(trial: Trial, number: int = 0) -> int:
    """The exit code of a worker that is about to end."""
    process = trial.fleet.slots[number].process
    assert process is not None
    return process.wait(SOON_S)


def test_sigterm_leaves_nothing_to_replay(enter: Enter) -> None:
    """SIGTERM checkpoints all that was processed and ends with 0 in time; the next start has nothing to read."""
    trial = enter(
        checkpoint={"interval_ms": 600_000}, worker={"watchdog_timeout_ms": 700_000, "shutdown_timeout_ms": 15_000}
    )
    send(trial.stage.settings, some(300))
    trial.fleet.scale(1)
    until(lambda: metric(trial, "streamformer_events_total") == 300, trial)
    assert not trial.gatherer.committed()
    began_s = time.monotonic()
    trial.fleet.terminate(0)
    assert ended(trial) == STOPPED
    assert time.monotonic() - began_s < 15 + SLACK_S
    assert sum(trial.gatherer.committed().values()) == 300
    trial.fleet.tick()
    time.sleep(0.5)
    trial.fleet.tick()
    until(lambda: is_ready(trial), trial)
    time.sleep(2)
    assert metric(trial, "streamformer_events_total") == 0


def test_stopping_is_bounded(enter: Enter) -> None:
    """A worker that cannot finish within worker.shutdown_timeout_ms ends itself with 71."""
    trial = enter(stops_for_ever, worker={"shutdown_timeout_ms": 2_000})
    trial.fleet.scale(1)
    until(lambda: is_ready(trial), trial)
    trial.fleet.terminate(0)
    began_s = time.monotonic()
    assert ended(trial) == FORCED
    assert 1.5 < time.monotonic() - began_s < 2 + SLACK_S


def test_a_second_signal_forces(enter: Enter) -> None:
    """While a worker is stopping, one more SIGTERM ends it at once with 71."""
    trial = enter(stops_for_ever, worker={"shutdown_timeout_ms": 600_000})
    trial.fleet.scale(1)
    until(lambda: is_ready(trial), trial)
    trial.fleet.terminate(0)
    until(lambda: "stopping: draining" in trial.fleet.log(0), trial)
    trial.fleet.terminate(0)
    began_s = time.monotonic()
    assert ended(trial) == FORCED
    assert time.monotonic() - began_s < SLACK_S
    assert "second signal" in trial.fleet.log(0)


def test_a_standstill_ends_the_worker(enter: Enter) -> None:
    """A worker that has records and does not process them ends itself with 70 and says what stands still."""
    trial = enter(processes_nothing, worker={"watchdog_timeout_ms": 3_000})
    send(trial.stage.settings, some(50))
    trial.fleet.scale(1)
    assert ended(trial) == ABORTED
    assert re.search(r"stopping: no progress for 3 s: .*processing of partition", trial.fleet.log(0))


def test_health_during_a_restore(enter: Enter) -> None:
    """While partitions are restored a worker is live and not ready, and says how many; then it is ready."""
    trial = enter(restores_slowly)
    trial.fleet.scale(1)
    until(lambda: asked(trial, "/readyz") == (503, f"{PARTITIONS} partitions are being restored\n"), trial)
    assert asked(trial, "/livez")[0] == 200
    until(lambda: is_ready(trial), trial)
    assert ready_partitions(trial, 0) in (0, PARTITIONS)  # the gauge is set each second
    assert asked(trial, "/livez")[0] == 200


def test_health_of_a_blocked_event_loop(enter: Enter) -> None:
    """An event loop that does not turn is told by `/livez`, which does not need it."""
    trial = enter(blocks_the_loop, worker={"watchdog_timeout_ms": 2_000})
    trial.fleet.scale(1)
    until(lambda: is_ready(trial), trial)
    send(trial.stage.settings, some(10))
    until(lambda: asked(trial, "/livez")[0] == 503, trial)
    assert "the event loop has been blocked" in asked(trial, "/livez")[1] or not is_ready(trial)


def test_a_restart_moves_no_partition(enter: Enter) -> None:
    """A worker that is back within the session gets its partitions again, and the other one keeps its own untouched."""
    trial = enter(kafka={"session_timeout_ms": 60_000, "heartbeat_interval_ms": 1_000})
    trial.fleet.scale(2)
    until(lambda: ready_partitions(trial, 0) + ready_partitions(trial, 1) == PARTITIONS, trial)
    until(lambda: ready_partitions(trial, 0) == ready_partitions(trial, 1) == 1, trial)
    acquired = trial.fleet.log(1).count("is ready at offset")
    trial.fleet.terminate(0)
    assert ended(trial) == STOPPED
    trial.fleet.tick()
    time.sleep(0.5)
    trial.fleet.tick()
    until(lambda: ready_partitions(trial, 0) == 1, trial)
    assert ready_partitions(trial, 1) == 1
    assert trial.fleet.log(1).count("is ready at offset") == acquired


def test_a_worker_that_stops_for_good_hands_over_when_its_session_ends(enter: Enter) -> None:
    """SIGTERM does not leave the group: the others take over after kafka.session_timeout_ms, not at once."""
    trial = enter()
    trial.fleet.scale(2)
    until(lambda: ready_partitions(trial, 0) == ready_partitions(trial, 1) == 1, trial)
    began_s = time.monotonic()
    trial.fleet.scale(1)
    assert ended(trial, 1) == STOPPED
    until(lambda: ready_partitions(trial, 0) == PARTITIONS, trial)
    assert SESSION_MS / 1_000 - HEARTBEAT_S < time.monotonic() - began_s < SESSION_MS / 1_000 + 2 * SLACK_S
