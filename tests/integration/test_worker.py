"""The worker as a process on a real broker: killed, stopped, poisoned and scaled, and judged by the checker."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.chaos.checks.checker import Verdict
from infra.chaos.faults.disk import alter_data_files
from infra.harness.deployment import Deployment, deploy
from infra.harness.events import Event, action, send
from infra.harness.history import LogRecord
from infra.harness.run import Run
from infra.harness.supervisor import ABORTED, STOPPED
from infra.harness.worker_process import sample
from infra.harness.workload import Workload, WorkloadOptions
from streams.wire.actions import RejectReason

pytestmark = [pytest.mark.broker, pytest.mark.slow]
SEED = 20_240
REST_S = 60.0
CACHE = "streamformer_cache_hits_total", "streamformer_cache_prefills_total"


@pytest.fixture
def deployment(broker: Any, topic_prefix: str, tmp_path: Path) -> Deployment:
    """Return a deployment with default settings."""
    return deploy(tmp_path, broker.bootstrap_servers, topic_prefix)


@pytest.fixture
def run(deployment: Deployment) -> Iterator[Run]:
    """Yield a run whose workers are not started yet."""
    with Run(deployment) as run:
        yield run


def workload_for(run: Run, seconds: float, options: WorkloadOptions) -> Workload:
    """Start a workload and let it run for some seconds; it is still running on return."""
    print(f"seed {SEED}")
    workload = Workload(run.deployment.settings, SEED, users=200, options=options)
    workload.start()
    run.wait(seconds)
    return workload


def wait_published(run: Run) -> None:
    """Let time pass until an embedding has been published."""
    run.wait_until(lambda: bool(run.reader.read_all(run.deployment.settings.topics.embeddings)), 30)


def wait_opened(run: Run) -> None:
    """Let time pass until worker 0 has a local database."""
    run.wait_until(run.deployment.data_dir(0).exists, 30)


def judged(run: Run) -> Verdict:
    """Wait for rest and return the verdict, which must have no violation."""
    assert run.rest(REST_S), f"{run.busy_with}\n{run.supervisor.log(0)[-3_000:]}"
    verdict = run.judge()
    assert [str(violation) for violation in verdict.violations] == []
    return verdict


def outputs_of(run: Run, user: str) -> list[LogRecord]:
    """Return all outputs of one user, from the topic itself."""
    return [
        each for each in run.reader.read_all(run.deployment.settings.topics.embeddings) if each.key == user.encode()
    ]


def test_a_run_without_faults_keeps_every_invariant(run: Run) -> None:
    """Duplicates, disorder, poison, oversized records and tombstones in the input lose and double nothing."""
    run.supervisor.scale(1)
    options = WorkloadOptions(rate=500, duplicates=0.05, disorder=0.1, poison=0.02, oversized=0.003, tombstones=0.005)
    workload_for(run, 8, options).stop()
    verdict = judged(run)
    assert verdict.counts["rejected"] > 20
    assert run.supervisor.stop() == {STOPPED: 1}
    assert not [each for each in run.supervisor.exits if not each.expected]


@pytest.mark.parametrize("disk", ["kept", "empty"])
def test_a_killed_worker_continues_where_its_checkpoint_ended(run: Run, disk: str) -> None:
    """Two SIGKILLs under load lose and double nothing, whether the local disk is kept or lost."""
    run.supervisor.scale(1)
    workload = workload_for(run, 1, WorkloadOptions(rate=500, tombstones=0.005))
    for _ in range(2):
        wait_published(run)
        wait_opened(run)
        run.wait(1.2)
        if disk == "empty":
            run.supervisor.hold(0)
            shutil.rmtree(run.deployment.data_dir(0))
            run.supervisor.start(0)
        else:
            run.supervisor.kill(0)
        run.wait(2)
    workload.stop()
    judged(run)


def test_a_terminated_worker_leaves_nothing_to_repeat(run: Run) -> None:
    """SIGTERM writes a checkpoint and ends with 0; without new events the next start publishes and commits nothing."""
    run.supervisor.scale(1)
    workload = workload_for(run, 1, WorkloadOptions(rate=300))
    wait_published(run)
    workload.stop()
    assert run.supervisor.stop() == {STOPPED: 1}
    run.supervisor.scale(1)
    run.wait(1)
    run.wait_until(run.supervisor.is_ready)
    judged(run)
    outputs = len(run.reader.read_all(run.deployment.settings.topics.embeddings))
    assert run.supervisor.stop() == {STOPPED: 1}
    run.supervisor.scale(1)
    run.wait(6)
    assert len(run.reader.read_all(run.deployment.settings.topics.embeddings)) == outputs
    judged(run)


def test_damaged_databases_are_rebuilt_without_a_restart(run: Run) -> None:
    """A worker whose data files all have unreadable blocks starts, rebuilds every partition, and continues."""
    run.supervisor.scale(1)
    workload = workload_for(run, 1, WorkloadOptions(rate=400))
    wait_published(run)
    workload.stop()
    judged(run)
    run.supervisor.stop()
    assert alter_data_files(run.deployment.data_dir(0))
    run.supervisor.scale(1)
    workload_for(run, 3, WorkloadOptions(rate=400)).stop()
    judged(run)
    assert not [each for each in run.supervisor.exits if not each.expected]
    assert run.supervisor.log(0).count("store cannot be read") >= run.deployment.settings.topics.partitions


def test_of_two_workers_the_other_takes_over_from_a_dead_one(run: Run) -> None:
    """The partitions of a worker that is killed and does not come back move to the other one, complete."""
    run.supervisor.scale(2)
    workload = workload_for(run, 1, WorkloadOptions(rate=400))
    wait_published(run)
    run.wait(2)
    run.supervisor.hold(0)
    run.wait(6)
    workload.stop()
    judged(run)
    assert run.supervisor.running() == [1]


def test_a_rebalance_leaves_the_cache_of_partitions_that_stay(run: Run) -> None:
    """Users of a partition that returns unchanged are extended by a token; only those taken over are prefilled."""
    settings, users = run.deployment.settings, [f"user-{number}" for number in range(40)]
    run.supervisor.scale(2)
    run.wait_until(lambda: run.supervisor.is_ready(0) and run.supervisor.is_ready(1))
    send(settings, [action(user, 1) for user in users])
    judged(run)
    hits, prefills = (metric(run, name) for name in CACHE)
    assert (hits, 0 < prefills < len(users)) == (0, True)
    run.supervisor.scale(1)
    run.wait_until(lambda: metric(run, "streamformer_partitions", 'state="ready"') == settings.topics.partitions)
    send(settings, [action(user, 2) for user in users])
    judged(run)
    assert [metric(run, name) for name in CACHE] == [prefills, len(users)]


def metric(run: Run, name: str, labels: str = "") -> float:
    """Return a metric of worker 0, summed over its labels."""
    return sample(run.supervisor.page(0, "/metrics")[1], name, labels)


def test_a_worker_stopped_past_its_session_can_write_nothing_more(run: Run) -> None:
    """A worker frozen until the other one owns its partitions is fenced when it wakes, and rejoins or restarts."""
    run.supervisor.scale(2)
    workload = workload_for(run, 1, WorkloadOptions(rate=400))
    wait_published(run)
    run.wait(2)
    begun_ms = time.time_ns() // 1_000_000
    run.supervisor.pause(0)
    run.wait(9)
    run.supervisor.resume(0)
    run.wait(6)
    workload.stop()
    run.explain(begun_ms)
    judged(run)


REJECTED: dict[RejectReason, Event] = {
    RejectReason.KEY_MISSING: (None, action("dan", 1)[1]),
    RejectReason.KEY_INVALID: (b"\xff", None),
    RejectReason.KEY_MISMATCH: (b"eve", action("dan", 1)[1]),
    RejectReason.VALUE_TOO_LARGE: (b"dan", b'"' + b"x" * 1_950_000),
    RejectReason.NOT_UTF8: (b"dan", b'{"user_id": "\xff"}'),
    RejectReason.NOT_JSON: (b"dan", b"\0\0\0\0\7{"),
    RejectReason.FIELD_MISSING: (b"dan", b"{}"),
    RejectReason.FIELD_TYPE: action("dan", 1, item_id=7),
    RejectReason.FIELD_LENGTH: action("dan", 1, item_id=""),
    RejectReason.FIELD_RANGE: action("dan", 1, duration_ms=-1),
    RejectReason.TIMESTAMP_UNIT: action("dan", 1, timestamp_ms=1_700_000_000),
    RejectReason.TIMESTAMP_PAST: action("dan", 1, timestamp_ms=1),
    RejectReason.TIMESTAMP_FUTURE: action("dan", 1, timestamp_ms=1 << 53),
}
OF_A_PLACE = {RejectReason.WRONG_PARTITION, RejectReason.DELETION_UNCLEAR}
"""Reasons that depend on the partition of a record; the cases from the field 5 and 6 and the fault `poison` hold a
real worker to them."""


def test_every_kind_of_poison_becomes_a_dead_letter(run: Run) -> None:
    """Each rejected record, up to the broker's limit in size, becomes an unchanged dead letter; the rest is applied."""
    assert set(REJECTED) | OF_A_PLACE == set(RejectReason)
    poison = [record for number, bad in enumerate(REJECTED.values(), 2) for record in (bad, action("dan", number))]
    send(run.deployment.settings, [action("dan", 1), *poison])
    run.supervisor.scale(1)
    assert judged(run).counts["rejected"] == len(REJECTED)
    assert not [each for each in run.supervisor.exits if not each.expected]
    reasons = {
        (dict(letter.headers)["error-reason"].decode(), letter.value)
        for letter in run.reader.read_all(run.deployment.settings.topics.dead_letter)
    }
    assert reasons == {(reason.value, value) for reason, (_, value) in REJECTED.items()}


def test_a_forgotten_user_comes_back_only_by_younger_events(run: Run) -> None:
    """After a tombstone older events change nothing, even after a kill; younger ones begin a new sequence."""
    settings = run.deployment.settings
    send(settings, [action("flo", 1), action("flo", 2), action("gus", 1), (b"flo", None), (b"gus", None)])
    send(settings, [action("flo", 3), action("gus", 2)])
    run.supervisor.scale(1)
    judged(run)
    run.supervisor.kill(0)
    later_ms = time.time_ns() // 1_000_000 + 1_000
    send(settings, [action("flo", 4), action("gus", 3, timestamp_ms=later_ms)])
    judged(run)
    assert outputs_of(run, "flo")[-1].value is None
    last = outputs_of(run, "gus")[-1]
    assert dict(last.headers)["sequence-length"] == b"1"


def test_the_same_events_again_change_nothing(run: Run) -> None:
    """Events sent a second time, as by a retrying producer, are dropped by event id, even after a restart."""
    history = [action("hal", number) for number in range(20)]
    send(run.deployment.settings, history)
    run.supervisor.scale(1)
    judged(run)
    published = len(outputs_of(run, "hal"))
    run.supervisor.kill(0)
    send(run.deployment.settings, history)
    judged(run)
    assert run.checker.model.users[b"hal"].count == 20
    assert len(outputs_of(run, "hal")) == published


def with_staleness(folder: Path, max_staleness_ms: int) -> dict[str, dict[str, Any]]:
    """Return settings under which only the age of unpublished actions triggers."""
    policy = folder / "policy.toml"
    policy.write_text(f"[triggers]\nevery_n = 100\nmax_staleness_ms = {max_staleness_ms}\n")
    return {"triggers": {"policy_file": str(policy)}}


@pytest.fixture
def timed(broker: Any, topic_prefix: str, tmp_path: Path) -> Iterator[Run]:
    """Yield a run whose users are published 1.5 s after their first new action."""
    with Run(deploy(tmp_path, broker.bootstrap_servers, topic_prefix, with_staleness(tmp_path, 1_500))) as run:
        yield run


@pytest.mark.parametrize("how", ["alive", "killed before"])
def test_a_timer_fires_with_no_further_event(timed: Run, how: str) -> None:
    """`max_staleness` publishes an inactive user on time, even if the worker is killed before."""
    timed.supervisor.scale(1)
    send(timed.deployment.settings, [action("warm", 1)])
    wait_published(timed)
    send(timed.deployment.settings, [action("ida", 1), action("ida", 2)])
    if how == "killed before":
        timed.wait(1)
        timed.supervisor.kill(0)
    judged(timed)
    (last,) = outputs_of(timed, "ida")
    headers = dict(last.headers)
    assert headers["reason"] == b"max_staleness"
    assert headers["sequence-length"] == b"2"
    if how == "alive":
        arrived_ms = timed.checker.model.arrived_ms[last.partition, int(headers["source-offset"])]
        assert 1_400 <= last.timestamp_ms - arrived_ms <= 2_500


@pytest.fixture
def crowded(broker: Any, topic_prefix: str, tmp_path: Path) -> Iterator[Run]:
    """Yield a run with little memory, whose users are published 3 s after their first new action."""
    limits = {"state": {"hot_users_max": 256}, "kafka": {"poll_records_max": 200}}
    overrides = {**with_staleness(tmp_path, 3_000), **limits}
    with Run(deploy(tmp_path, broker.bootstrap_servers, topic_prefix, overrides)) as run:
        yield run


def test_more_timers_fall_due_than_users_fit_into_memory(crowded: Run) -> None:
    """Each of many users on disk is published when its timer fires, although they are loaded in portions."""
    users = [f"user-{number}" for number in range(3_000)]
    send(crowded.deployment.settings, [action(user, 1) for user in users])
    crowded.supervisor.scale(1)
    judged(crowded)
    published = {each.key for each in crowded.reader.read_all(crowded.deployment.settings.topics.embeddings)}
    assert published == {user.encode() for user in users}


def ends_with_one_line(run: Run) -> str:
    """Return the error line of a worker that cannot start; its exit code is not 0 and its log has no traceback."""
    run.supervisor.scale(1)
    run.supervisor.workers[0].wanted = False
    run.wait_until(lambda: bool(run.supervisor.exits))
    (end,) = run.supervisor.exits
    assert end.code not in (STOPPED, ABORTED)
    assert end.code > 0
    assert "Traceback" not in run.supervisor.log(0)
    assert end.last_line.startswith("error:")
    return end.last_line


@pytest.mark.parametrize("fault", ["missing", "corrupt"])
def test_an_unusable_release_is_reported_in_one_line(run: Run, fault: str) -> None:
    """A worker whose release is missing or altered ends with one line that names it."""
    weights = run.deployment.release_dir / "weights.safetensors"
    if fault == "missing":
        shutil.rmtree(run.deployment.release_dir)
    else:
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    assert "release" in ends_with_one_line(run)


def test_an_unreachable_broker_is_reported_in_one_line(run: Run) -> None:
    """A worker that finds no broker ends with one line that names the address."""
    config = run.deployment.config
    address = run.deployment.settings.kafka.bootstrap_servers
    config.write_text(config.read_text().replace(address, "127.0.0.1:9"))
    assert "127.0.0.1:9" in ends_with_one_line(run)


def test_a_wrong_partition_count_is_reported_in_one_line(run: Run) -> None:
    """A worker whose settings and topics differ in the number of partitions does not start."""
    config = run.deployment.config
    config.write_text(config.read_text().replace("partitions = 4", "partitions = 3"))
    line = ends_with_one_line(run)
    assert "partitions" in line
    assert run.deployment.settings.topics.actions in line
