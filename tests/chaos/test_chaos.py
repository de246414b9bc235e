"""A short chaos run, and tests that each part of it notices what it is there to notice."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from infra.chaos.checks.violations import Kind, Violation
from infra.chaos.fault_context import FaultContext, play
from infra.chaos.faults.catalogue import BY_NAME, CATALOGUE, Group, pairs, usable
from infra.chaos.faults.cluster import internal_partition, while_others_go_on
from infra.chaos.faults.workers import rebalances_seen
from infra.chaos.round import Round, is_permitted
from infra.chaos.schedule import Outcome, Plan, next_pair
from infra.harness.deployment import deploy
from infra.harness.run import Run
from infra.harness.stall_monitor import StallMonitor
from infra.harness.supervisor import ABORTED
from infra.harness.workload import Workload, WorkloadOptions
from infra.kafka.broker import Broker
from infra.kafka.cluster import Cluster

SEED = 7
DEADLINE_S = 170.0
SHORT = "worker-killed+disorder,worker-terminated+poison,broker-killed"
KEYS = {
    "bench", "machine", "seed", "brokers", "minutes", "episodes", "worker_kills", "broker_restarts", "faults",
    "left_out", "violations", "kinds", "explained_outputs", "worst_resume_seconds", "start_seconds_median",
    "freshness_p50_ms_under_faults", "freshness_p99_ms_under_faults", "freshness_worst_ms", "longest_stall_seconds",
    "rebalances", "memory_mb_first", "memory_mb_last",
}  # fmt: skip


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the chaos command."""
    return subprocess.run(
        [sys.executable, "-m", "infra.chaos", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.mark.broker
@pytest.mark.slow
def test_a_short_run_breaks_no_invariant(tmp_path: Path) -> None:
    """Kills of workers and of the broker, disorder and poison break no invariant, and the result counts them.

    The time to resume depends on the machine, so this limit alone is not part of the test.
    """
    print(f"seed {SEED}")
    options = ("--brokers", "1", "--minutes", "0.8", "--faults", SHORT, "--keep-going", "--out", str(tmp_path))
    ended = command("--seed", str(SEED), *options)
    result = json.loads(ended.stdout.splitlines()[-1])
    assert set(result) == KEYS
    assert set(result["kinds"]) <= {Kind.SLOW_RESUME}, ended.stderr
    assert ended.returncode == (1 if result["violations"] else 0)
    assert result["worker_kills"] >= 4
    assert result["faults"]["worker-killed"] >= 1
    assert f"seed {SEED}" in (tmp_path / "chaos.md").read_text()
    assert json.loads((tmp_path / "chaos.json").read_text()) == result


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (("--faults", "worker-tickled"), "worker-tickled"),
        (("--faults", "poison+disorder"), "cannot strike together"),
        (("--faults", "offsets-leader-killed", "--brokers", "1"), "needs 3 brokers"),
        (("--brokers", "2"), "1 or 3"),
    ],
)
def test_a_fault_that_does_not_exist_is_reported(arguments: tuple[str, ...], reported: str) -> None:
    """An unknown name, or a pair that would undo itself, ends with one clear line and an exit code other than 0."""
    ended = command(*arguments)
    assert ended.returncode not in (0, 1)
    assert reported in " ".join(ended.stderr.replace("│", " ").split())
    assert "Traceback" not in ended.stderr


def test_every_fault_has_a_name_of_its_own_and_most_have_partners() -> None:
    """Names are unique, and every fault that may be drawn again is in some pair."""
    assert len(BY_NAME) == len(CATALOGUE)
    paired = {fault.name for pair in pairs(brokers=3) for fault in pair}
    assert {fault.name for fault in CATALOGUE if not fault.once} - paired <= {"rebalance-in-inference"}


def test_exits_are_judged_by_what_was_done_to_the_worker() -> None:
    """A worker may end because it was terminated or killed, or because a fault of the round permits it."""
    poison, frozen = [BY_NAME["poison"]], [BY_NAME["worker-frozen-10s"]]
    assert is_permitted(0, True, poison)
    assert is_permitted(-9, True, poison)
    assert not is_permitted(0, False, poison)
    assert not is_permitted(ABORTED, False, poison)
    assert is_permitted(ABORTED, False, frozen)
    assert not is_permitted(1, False, frozen)


def test_rebalances_are_counted_by_partitions_that_are_ready_again() -> None:
    """Partitions of one assignment count once; one that is ready a second time belongs to the next."""
    assert rebalances_seen("") == 0
    log = "\n".join(f"INFO partition {number} is ready at offset 5 after 0.1 s" for number in (0, 1, 2, 1, 0, 0))
    assert rebalances_seen(log) == 3


@pytest.mark.parametrize(
    ("name", "partition"),
    [("hello", 99_162_322 % 4), ("polygenelubricants", 0), ("Aa", 2_112 % 4), ("chaos", 94_623_616 % 4)],
)
def test_the_partition_of_a_group_is_that_of_its_hash_in_java(name: str, partition: int) -> None:
    """The expected hashes are Java's; the one of `polygenelubricants` is the smallest integer, which counts as 0."""
    assert internal_partition(name) == partition


def test_one_broker_leaves_out_the_faults_of_several() -> None:
    """No fault or pair that is drawn on one broker needs three, and on three brokers none is left out for it."""
    assert {fault.brokers_min for pair in pairs(brokers=1) for fault in pair} == {1}
    needy = {fault.name for fault in CATALOGUE} - {fault.name for fault in usable(brokers=1)}
    assert "source-leader-killed" in needy
    assert "broker-killed" not in needy
    assert usable(brokers=3) == list(CATALOGUE)


@pytest.mark.parametrize(("restarts", "rolled"), [(0, True), (11, False), (40, False)])
def test_a_schedule_that_is_behind_catches_up(restarts: int, *, rolled: bool) -> None:
    """Far behind with restarts of brokers, the next pair rolls all of them; behind with kills, it kills workers."""
    supervisor = SimpleNamespace(kills=0)
    context: Any = SimpleNamespace(
        run=SimpleNamespace(supervisor=supervisor),
        cluster=SimpleNamespace(brokers=[1, 2, 3]),
        broker_restarts=restarts,
        rng=random.Random(SEED),
    )
    pair = next_pair(context, elapsed_s=540.0)
    assert "worker-killed" in {fault.name for fault in pair}
    assert ("brokers-rolled" in {fault.name for fault in pair}) == rolled
    assert restarts == 40 or Group.BROKER in {fault.group for fault in pair}


def test_the_result_counts_the_outputs_that_a_fault_explained() -> None:
    """Counts run through all rounds, so those of the last round are the totals."""
    outcome = Outcome(Plan(SEED, 1.0))
    assert outcome.explained_outputs == 0
    for stale in (1, 3):
        counts = Counter(events=100, explained_stale=stale, explained_repeated=2)
        outcome.rounds.append(Round(1, ("poison",), 1.0, 1.0, np.zeros(0, np.float32), counts, Counter(), ()))
    assert outcome.explained_outputs == 5


class _Idle:
    """The part of a context that `play` uses."""

    class run:
        class supervisor:
            ticks = 0

            @classmethod
            def tick(cls) -> None:
                cls.ticks += 1


def test_faults_run_side_by_side_and_heal_also_when_one_breaks() -> None:
    """Two faults alternate by their times; when one raises, the other still heals."""
    events: list[str] = []

    def fault(name: str, wait_s: float, *, breaks: bool = False) -> Iterator[float]:
        try:
            events.append(f"{name} strikes")
            yield wait_s
            if breaks:
                raise RuntimeError(name)
            yield wait_s
        finally:
            events.append(f"{name} heals")

    context: Any = _Idle()
    play(context, [fault("slow", 0.4), fault("quick", 0.1)])
    assert events == ["slow strikes", "quick strikes", "quick heals", "slow heals"]
    events.clear()
    with pytest.raises(RuntimeError):
        play(context, [fault("patient", 30.0), fault("broken", 0.1, breaks=True)])
    assert events == ["patient strikes", "broken strikes", "broken heals", "patient heals"]


def test_the_wait_of_a_fault_begins_after_its_step() -> None:
    """A step that blocks for longer than the wait that it asks for does not shorten that wait."""
    times: list[float] = []

    def fault() -> Iterator[float]:
        time.sleep(0.2)
        times.append(time.monotonic())
        yield 0.15
        times.append(time.monotonic())

    context: Any = _Idle()
    play(context, [fault()])
    assert times[1] - times[0] >= 0.15


class _Watched:
    """The part of a context that looks at the partitions beside a broken one; commits of `moving` advance."""

    def __init__(self, moving: set[int], *, exits: int = 0) -> None:
        self.found: list[Violation] = []
        self.deployment = SimpleNamespace(settings=SimpleNamespace(topics=SimpleNamespace(partitions=3)))
        supervisor = SimpleNamespace(exits=[], running=lambda: [0])
        offsets = iter((dict.fromkeys(range(3), 5), {number: 9 if number in moving else 5 for number in range(3)}))
        self.run = SimpleNamespace(supervisor=supervisor, reader=SimpleNamespace(committed=lambda: next(offsets)))
        self._exits = exits

    def watch(self) -> list[int]:
        """Return the partitions that are reported as held up by partition 0."""
        context: Any = self
        for _ in while_others_go_on(context, 0, 1.0):
            self.run.supervisor.exits.extend(range(self._exits))
        return [each.partition for each in self.found if each.kind is Kind.HELD_UP]


def test_a_partition_that_a_broken_one_holds_up_is_reported() -> None:
    """While one partition has no leader, the commits of every other one advance, unless their worker was disturbed."""
    assert _Watched({1, 2}).watch() == []
    assert _Watched({1}).watch() == [2]
    assert _Watched({1}, exits=1).watch() == []


@pytest.mark.broker
@pytest.mark.slow
def test_a_stall_that_no_worker_notices_is_found(broker: Broker, topic_prefix: str, tmp_path: Path) -> None:
    """Without a worker, the monitor reports every partition once the watchdog's timeout is over."""
    deployment = deploy(tmp_path, broker.bootstrap_servers, topic_prefix)
    with Run(deployment) as run:
        monitor = StallMonitor(run)
        monitor._unnoticed_max_s = 3.0
        monitor._all_healthy = lambda: True  # type: ignore[method-assign]
        workload = Workload(deployment.settings, SEED, users=50, options=WorkloadOptions(rate=200))
        with monitor:
            workload.start()
            context = FaultContext(Cluster([broker]), run, workload, random.Random(SEED), tmp_path, 0)
            play(context, [iter([6.0])])
            workload.stop()
        found = monitor.take()
    assert {each.kind for each in found} == {Kind.UNSEEN_STALL}
    assert {each.partition for each in found} == set(range(deployment.settings.topics.partitions))
