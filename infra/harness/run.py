"""One run under judgement: a deployment, its workers, and the checker that reads its topics.

with Run(deployment) as run:
    run.supervisor.scale(1)
    ...                        # workload, faults
    run.rest(30)               # until everything is processed and published
    verdict = run.judge()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from kafka.errors import KafkaError

from infra.chaos.checks.checker import Checker, Rules, Verdict
from infra.chaos.checks.violations import Explained
from infra.harness.deployment import Deployment
from infra.harness.feature_files import feature_rules
from infra.harness.supervisor import Supervisor
from infra.harness.topic_reader import HistoryReader
from infra.harness.worker_process import WORKER
from streams.features import load_features

TICK_S = 0.1
LOOK_EVERY_S = 0.3
QUIET_S = 1.2
"""More than two checkpoint intervals, so that changes of the last acknowledgements are in a checkpoint too."""
PATIENCE_S = 60.0
SAMPLE_EVERY = 16


class NotReached(AssertionError):
    """A condition did not come true in time."""


class Run:
    """A deployment at work."""

    def __init__(self, deployment: Deployment, command: Sequence[str] = WORKER) -> None:
        self.deployment = deployment
        self.supervisor = Supervisor(deployment, command)
        self.reader = HistoryReader(deployment.settings)
        self.explained: list[Explained] = []
        """Times in which a fault may make outputs stale or repeated; `explain` adds to it."""
        self.busy_with = ""
        """Work that was left when `rest` last looked."""
        oracle = deployment.oracle()
        state, topic = deployment.settings.state, deployment.settings.topics.actions
        rules = Rules(
            state.sequence_length,
            state.chunk_length,
            oracle.version,
            topic,
            SAMPLE_EVERY,
            self.explained,
            deployment.settings.topics.partitions,
            feature_rules(deployment.settings),
            load_features(deployment.settings),
        )
        self.checker = Checker(rules, oracle)

    def __enter__(self) -> Run:
        """Return the run; leaving the block kills its workers."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Kill the workers and close the connections."""
        self.supervisor.close()
        self.reader.close()

    def wait(self, seconds: float) -> None:
        """Let time pass while the supervisor restarts workers."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self.supervisor.tick()
            time.sleep(TICK_S)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        """Let time pass until the condition holds; raise `NotReached`, with worker 0's log, when it does not."""
        until_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > until_s:
                raise NotReached(f"the condition did not hold within {timeout_s:.0f} s:\n{self.supervisor.output(0)}")
            self.wait(TICK_S)

    def wait_resumed(self, timeout_s: float = PATIENCE_S) -> float:
        """Let time pass until every committed offset has passed the present end of the log; return the seconds.

        Returns infinity if that takes longer.
        """
        started_s, wanted = time.monotonic(), None
        while time.monotonic() - started_s < timeout_s:
            self.supervisor.tick()
            try:
                wanted = wanted if wanted is not None else self.reader.ends()
                committed = self.reader.committed()
            except (KafkaError, OSError):
                continue
            if all(committed.get(partition, 0) >= end for partition, end in wanted.items()):
                return time.monotonic() - started_s
            time.sleep(TICK_S)
        return float("inf")

    def rest(self, timeout_s: float) -> bool:
        """Let time pass until no work is left; return False, with `busy_with` set, if that takes longer.

        The workload must have stopped.
        """
        deadline_s, quiet_since_s = time.monotonic() + timeout_s, time.monotonic()
        while time.monotonic() < deadline_s:
            self.supervisor.tick()
            self.busy_with = self._remaining_work()
            if self.busy_with:
                quiet_since_s = time.monotonic()
            elif time.monotonic() - quiet_since_s >= QUIET_S:
                return True
            time.sleep(LOOK_EVERY_S)
        return False

    def explain(self, begin_ms: int) -> None:
        """Allow stale and repeated outputs from `begin_ms` until now, because of a fault."""
        self.explained.append(Explained(begin_ms, time.time_ns() // 1_000_000))

    def judge(self) -> Verdict:
        """Compare everything with the model; only at rest."""
        self.checker.feed(self.reader.read_new())
        return self.checker.judge(self.reader.committed())

    def _remaining_work(self) -> str:
        """Describe what was written since the last look or is still to be written; empty at rest."""
        try:
            history = self.reader.read_new()
            self.checker.feed(history)
            committed = self.reader.committed()
        except KafkaError as error:
            return f"the broker does not answer: {error!r}"
        for partition, end in self.checker.model.ends.items():
            if committed.get(partition, 0) < end:
                return f"partition {partition} is committed up to {committed.get(partition, 0)} of {end}"
        if self.checker.is_behind():
            return "users wait for their embeddings or features"
        return "workers write" if history.outputs or history.features or history.changelog else ""
