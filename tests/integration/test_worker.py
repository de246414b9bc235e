"""The worker as a process on the real broker: killed, stopped, poisoned, scaled, and held against the checker."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.chaos.checks.checker import Verdict
from infra.chaos.faults.disk import alter_data_files
from infra.harness.deployment import Stage, set_up
from infra.harness.model import LogRecord
from infra.harness.run import Trial
from infra.harness.supervisor import ABORTED, STOPPED
from infra.harness.workload import Habits, Traffic
from streams.wire.actions import RefusalReason
from tests.integration.trials import Sent, action, asked, is_ready, send, until

pytestmark = [pytest.mark.broker, pytest.mark.slow]
SEED = 20_240
REST_S = 60.0
CACHE = "streamformer_cache_hits_total", "streamformer_cache_prefills_total"


@pytest.fixture
def stage(broker: Any, topic_prefix: str, tmp_path: Path) -> Stage:
    return set_up(tmp_path, broker.bootstrap_servers, topic_prefix)


@pytest.fixture
def trial(stage: Stage) -> Iterator[Trial]:
    with Trial(stage) as trial:
        yield trial


def traffic_for(trial: Trial, seconds: float, habits: Habits) -> Traffic:
    """Traffic that has been flowing for so long, and still does."""
    print(f"seed {SEED}")
    traffic = Traffic(trial.stage.settings, SEED, users=200, habits=habits)
    traffic.start()
    wait(trial, seconds)
    return traffic


def wait(trial: Trial, seconds: float) -> None:
    """Let time pass under supervision."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        trial.fleet.tick()
        time.sleep(0.1)


def wait_published(trial: Trial, timeout_s: float = 30.0) -> None:
    """Let time pass until an embedding has been published."""
    until_s = time.monotonic() + timeout_s
    outputs = trial.stage.settings.topics.embeddings
    while not trial.gatherer.read_all(outputs):
        assert time.monotonic() < until_s, trial.fleet.log(0)[-2_000:]
        wait(trial, 0.3)


def wait_opened(trial: Trial, timeout_s: float = 30.0) -> None:
    """Let time pass until worker 0 has a local database."""
    until_s = time.monotonic() + timeout_s
    while not trial.stage.data_dir(0).exists():
        assert time.monotonic() < until_s, trial.fleet.log(0)[-2_000:]
        wait(trial, 0.3)


def judged(trial: Trial) -> Verdict:
    """The verdict at rest, without a violation."""
    assert trial.rest(REST_S), f"{trial.busy_with}\n{trial.fleet.log(0)[-3_000:]}"
    verdict = trial.judge()
    assert [str(violation) for violation in verdict.violations] == []
    return verdict


def outputs_of(trial: Trial, user: str) -> list[LogRecord]:
    """All outputs of one user, from the topic itself."""
    return [
        each for each in trial.gatherer.read_all(trial.stage.settings.topics.embeddings) if each.key == user.encode()
    ]


def test_a_run_without_faults_keeps_every_law(trial: Trial) -> None:
    """With duplicates, disorder, poison, oversized records and tombstones in the input nothing is lost or doubled."""
    trial.fleet.scale(1)
    habits = Habits(rate=500, duplicates=0.05, disorder=0.1, poison=0.02, oversized=0.003, tombstones=0.005)
    traffic_for(trial, 8, habits).stop()
    verdict = judged(trial)
    assert verdict.counts["refused"] > 20
    assert trial.fleet.stop() == {STOPPED: 1}
    assert not [each for each in trial.fleet.exits if not each.expected]


@pytest.mark.parametrize("disk", ["kept", "empty"])
def test_a_killed_worker_goes_on_where_its_checkpoint_ended(trial: Trial, disk: str) -> None:
    """kill -9 under traffic, twice, loses and doubles nothing, with the local disk as it was or gone."""
    trial.fleet.scale(1)
    traffic = traffic_for(trial, 1, Habits(rate=500, tombstones=0.005))
    for _ in range(2):
        wait_published(trial)
        wait_opened(trial)
        wait(trial, 1.2)
        if disk == "empty":
            trial.fleet.hold(0)
            shutil.rmtree(trial.stage.data_dir(0))
            trial.fleet.release(0)
        else:
            trial.fleet.kill(0)
        wait(trial, 2)
    traffic.stop()
    judged(trial)


def test_a_terminated_worker_leaves_nothing_to_repeat(trial: Trial) -> None:
    """SIGTERM checkpoints and ends with 0; the next start publishes and commits nothing new without new events."""
    trial.fleet.scale(1)
    traffic = traffic_for(trial, 1, Habits(rate=300))
    wait_published(trial)
    traffic.stop()
    assert trial.fleet.stop() == {STOPPED: 1}
    trial.fleet.scale(1)
    wait(trial, 1)
    until(lambda: is_ready(trial), trial)
    judged(trial)
    outputs = len(trial.gatherer.read_all(trial.stage.settings.topics.embeddings))
    assert trial.fleet.stop() == {STOPPED: 1}
    trial.fleet.scale(1)
    wait(trial, 6)
    assert len(trial.gatherer.read_all(trial.stage.settings.topics.embeddings)) == outputs
    judged(trial)


def test_damaged_databases_are_rebuilt_without_a_restart(trial: Trial) -> None:
    """With unreadable blocks in the data files of every partition a worker starts, rebuilds them all, and goes on."""
    trial.fleet.scale(1)
    traffic = traffic_for(trial, 1, Habits(rate=400))
    wait_published(trial)
    traffic.stop()
    judged(trial)
    trial.fleet.stop()
    assert alter_data_files(trial.stage.data_dir(0))
    trial.fleet.scale(1)
    traffic_for(trial, 3, Habits(rate=400)).stop()
    judged(trial)
    assert not [each for each in trial.fleet.exits if not each.expected]
    assert trial.fleet.log(0).count("store cannot be read") >= trial.stage.settings.topics.partitions


def test_of_two_workers_the_other_takes_over_from_a_dead_one(trial: Trial) -> None:
    """A worker that is killed and does not come back leaves its partitions, whole, to the other one."""
    trial.fleet.scale(2)
    traffic = traffic_for(trial, 1, Habits(rate=400))
    wait_published(trial)
    wait(trial, 2)
    trial.fleet.hold(0)
    wait(trial, 6)
    traffic.stop()
    judged(trial)
    assert trial.fleet.running() == [1]


def test_a_rebalance_leaves_the_cache_of_partitions_that_stay(trial: Trial) -> None:
    """Users of a partition that comes back as it went are extended by a token; only those taken over are prefilled."""
    settings, users = trial.stage.settings, [f"user-{number}" for number in range(40)]
    trial.fleet.scale(2)
    until(lambda: is_ready(trial, 0) and is_ready(trial, 1), trial)
    send(settings, [action(user, 1) for user in users])
    judged(trial)
    hits, prefills = (metric(trial, name) for name in CACHE)
    assert (hits, 0 < prefills < len(users)) == (0, True)
    trial.fleet.scale(1)
    until(lambda: metric(trial, 'streamformer_partitions{state="ready"}') == settings.topics.partitions, trial)
    send(settings, [action(user, 2) for user in users])
    judged(trial)
    assert [metric(trial, name) for name in CACHE] == [prefills, len(users)]


def metric(trial: Trial, name: str) -> float:
    """A number that worker 0 reports."""
    return float(re.findall(rf"^{re.escape(name)} (.*)$", asked(trial, "/metrics")[1], re.MULTILINE)[0])


def test_a_worker_stopped_past_its_session_can_write_nothing_more(trial: Trial) -> None:
    """A worker frozen until the other one owns its partitions is fenced when it wakes, and joins or restarts."""
    trial.fleet.scale(2)
    traffic = traffic_for(trial, 1, Habits(rate=400))
    wait_published(trial)
    wait(trial, 2)
    begun_ms = time.time_ns() // 1_000_000
    trial.fleet.pause(0)
    wait(trial, 9)
    trial.fleet.resume(0)
    wait(trial, 6)
    traffic.stop()
    trial.explain(begun_ms)
    judged(trial)


REFUSALS: dict[RefusalReason, Sent] = {
    RefusalReason.KEY_MISSING: (None, action("dan", 1)[1]),
    RefusalReason.KEY_INVALID: (b"\xff", None),
    RefusalReason.KEY_MISMATCH: (b"eve", action("dan", 1)[1]),
    RefusalReason.VALUE_TOO_LARGE: (b"dan", b'"' + b"x" * 1_950_000),
    RefusalReason.NOT_UTF8: (b"dan", b'{"user_id": "\xff"}'),
    RefusalReason.NOT_JSON: (b"dan", b"\0\0\0\0\7{"),
    RefusalReason.FIELD_MISSING: (b"dan", b"{}"),
    RefusalReason.FIELD_TYPE: action("dan", 1, item_id=7),
    RefusalReason.FIELD_LENGTH: action("dan", 1, item_id=""),
    RefusalReason.FIELD_RANGE: action("dan", 1, duration_ms=-1),
    RefusalReason.TIMESTAMP_UNIT: action("dan", 1, timestamp_ms=1_700_000_000),
    RefusalReason.TIMESTAMP_PAST: action("dan", 1, timestamp_ms=1),
    RefusalReason.TIMESTAMP_FUTURE: action("dan", 1, timestamp_ms=1 << 53),
}


def test_every_kind_of_poison_becomes_a_dead_letter(trial: Trial) -> None:
    """One record of each reason, the largest as large as the broker takes, costs itself alone: untouched, explained."""
    assert set(REFUSALS) == set(RefusalReason)
    poison = [record for number, bad in enumerate(REFUSALS.values(), 2) for record in (bad, action("dan", number))]
    send(trial.stage.settings, [action("dan", 1), *poison])
    trial.fleet.scale(1)
    assert judged(trial).counts["refused"] == len(REFUSALS)
    assert not [each for each in trial.fleet.exits if not each.expected]
    reasons = {
        (dict(letter.headers)["error-reason"].decode(), letter.value)
        for letter in trial.gatherer.read_all(trial.stage.settings.topics.dead_letter)
    }
    assert reasons == {(reason.value, value) for reason, (_, value) in REFUSALS.items()}


def test_a_forgotten_user_comes_back_only_by_younger_events(trial: Trial) -> None:
    """After a tombstone older events change nothing, also across a kill; younger ones begin a new sequence."""
    settings = trial.stage.settings
    send(settings, [action("flo", 1), action("flo", 2), action("gus", 1), (b"flo", None), (b"gus", None)])
    send(settings, [action("flo", 3), action("gus", 2)])
    trial.fleet.scale(1)
    judged(trial)
    trial.fleet.kill(0)
    later_ms = time.time_ns() // 1_000_000 + 1_000
    send(settings, [action("flo", 4), action("gus", 3, timestamp_ms=later_ms)])
    judged(trial)
    assert outputs_of(trial, "flo")[-1].value is None
    last = outputs_of(trial, "gus")[-1]
    assert dict(last.headers)["sequence-length"] == b"1"


def test_the_same_events_again_change_nothing(trial: Trial) -> None:
    """A history sent a second time, as a retrying producer would, is dropped by event id, also after a restart."""
    history = [action("hal", number) for number in range(20)]
    send(trial.stage.settings, history)
    trial.fleet.scale(1)
    judged(trial)
    published = len(outputs_of(trial, "hal"))
    trial.fleet.kill(0)
    send(trial.stage.settings, history)
    judged(trial)
    assert trial.checker.truth.users[b"hal"].count == 20
    assert len(outputs_of(trial, "hal")) == published


@pytest.fixture
def timed(broker: Any, topic_prefix: str, tmp_path: Path) -> Iterator[Trial]:
    policy = tmp_path / "policy.toml"
    policy.write_text("[triggers]\nevery_n = 100\nmax_staleness_ms = 1500\n")
    with Trial(
        set_up(tmp_path, broker.bootstrap_servers, topic_prefix, {"triggers": {"policy_file": str(policy)}})
    ) as trial:
        yield trial


@pytest.mark.parametrize("how", ["alive", "killed before"])
def test_a_timer_fires_with_no_further_event(timed: Trial, how: str) -> None:
    """`max_staleness` publishes a user that acts no more, on time, and also after the worker was killed meanwhile."""
    timed.fleet.scale(1)
    send(timed.stage.settings, [action("warm", 1)])
    wait_published(timed)
    send(timed.stage.settings, [action("ida", 1), action("ida", 2)])
    if how == "killed before":
        wait(timed, 1)
        timed.fleet.kill(0)
    judged(timed)
    (last,) = outputs_of(timed, "ida")
    headers = dict(last.headers)
    assert headers["reason"] == b"max_staleness"
    assert headers["sequence-length"] == b"2"
    if how == "alive":
        arrived_ms = timed.checker.truth.arrived_ms[last.partition, int(headers["source-offset"])]
        assert 1_400 <= last.timestamp_ms - arrived_ms <= 2_500


@pytest.fixture
def crowded(broker: Any, topic_prefix: str, tmp_path: Path) -> Iterator[Trial]:
    policy = tmp_path / "policy.toml"
    policy.write_text("[triggers]\nevery_n = 100\nmax_staleness_ms = 3000\n")
    limits = {"state": {"hot_users_max": 256}, "kafka": {"poll_records_max": 200}}
    with Trial(
        set_up(tmp_path, broker.bootstrap_servers, topic_prefix, {"triggers": {"policy_file": str(policy)}, **limits})
    ) as trial:
        yield trial


def test_more_timers_fall_due_than_users_fit_into_memory(crowded: Trial) -> None:
    """Each of many users that wait on disk gets its embedding when its timer fires, though they come in portions."""
    users = [f"user-{number}" for number in range(3_000)]
    send(crowded.stage.settings, [action(user, 1) for user in users])
    crowded.fleet.scale(1)
    judged(crowded)
    published = {each.key for each in crowded.gatherer.read_all(crowded.stage.settings.topics.embeddings)}
    assert published == {user.encode() for user in users}


def ends_with_one_line(trial: Trial) -> str:
    """What a worker says that cannot start: its last line, the exit code not 0, no traceback."""
    trial.fleet.scale(1)
    trial.fleet.slots[0].wanted = False
    until_s = time.monotonic() + 60
    while not trial.fleet.exits:
        assert time.monotonic() < until_s, "the worker neither works nor ends"
        wait(trial, 0.2)
    (end,) = trial.fleet.exits
    assert end.code not in (STOPPED, ABORTED)
    assert end.code > 0
    assert "Traceback" not in trial.fleet.log(0)
    return end.last_words


@pytest.mark.parametrize("fault", ["missing", "corrupt"])
def test_an_unusable_release_is_told_in_one_line(trial: Trial, fault: str) -> None:
    """Without its release, or with one that was altered, a worker ends with one line that names it."""
    weights = trial.stage.release_dir / "weights.safetensors"
    if fault == "missing":
        shutil.rmtree(trial.stage.release_dir)
    else:
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    assert "release" in ends_with_one_line(trial)


def test_an_unreachable_broker_is_told_in_one_line(trial: Trial) -> None:
    """A worker that finds no broker ends with one line that names the address."""
    config = trial.stage.config
    address = trial.stage.settings.kafka.bootstrap_servers
    config.write_text(config.read_text().replace(address, "127.0.0.1:9"))
    assert "127.0.0.1:9" in ends_with_one_line(trial)


def test_a_wrong_partition_count_is_told_in_one_line(trial: Trial) -> None:
    """A worker whose settings say another number of partitions than the topics have does not begin."""
    config = trial.stage.config
    config.write_text(config.read_text().replace("partitions = 4", "partitions = 3"))
    line = ends_with_one_line(trial)
    assert "partitions" in line
    assert trial.stage.settings.topics.actions in line
