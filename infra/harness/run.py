"""One run under judgement: a deployment, its workers, and the checker that reads along.

with Run(deployment) as run:
    run.supervisor.scale(1)
    ...                        # workload, faults
    run.rest(30)             # until everything is processed and published
    verdict = run.judge()
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from kafka.errors import KafkaError

from infra.chaos.checks.checker import Checker, Rules, Verdict
from infra.chaos.checks.violations import Explained
from infra.harness.deployment import Deployment
from infra.harness.supervisor import WORKER, Supervisor
from infra.harness.topic_reader import HistoryReader

LOOK_EVERY_S = 0.3
QUIET_S = 1.2
"""More than two checkpoint intervals: what became dirty by the last acknowledgements is written too."""


class Run:
    """A deployment at work."""

    def __init__(self, deployment: Deployment, command: Sequence[str] = WORKER) -> None:
        self.deployment = deployment
        self.supervisor = Supervisor(deployment, command)
        self.explained: list[Explained] = []
        """Add to it when a fault may make outputs stale or repeated."""
        self.busy_with = ""
        """What was left to do when `rest` last looked."""
        self.reader = HistoryReader(deployment.settings)
        oracle = deployment.oracle()
        state, topic = deployment.settings.state, deployment.settings.topics.actions
        rules = Rules(state.sequence_length, state.chunk_length, oracle.version, topic, self.explained)
        self.checker = Checker(rules, oracle)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.supervisor.close()
        self.reader.close()

    def rest(self, timeout_s: float) -> bool:
        """Keep the workers running until nothing is left to do; False, and why in `busy_with`, when that took longer.

        Workload has stopped.
        """
        deadline_s, quiet_since_s = time.monotonic() + timeout_s, time.monotonic()
        while time.monotonic() < deadline_s:
            self.supervisor.tick()
            self.busy_with = self._busy_with()
            if self.busy_with:
                quiet_since_s = time.monotonic()
            elif time.monotonic() - quiet_since_s >= QUIET_S:
                return True
            time.sleep(LOOK_EVERY_S)
        return False

    def explain(self, begin_ms: int) -> None:
        """From then until now a fault may have made outputs stale or repeated."""
        self.explained.append(Explained(begin_ms, time.time_ns() // 1_000_000))

    def judge(self) -> Verdict:
        """Hold everything against the model; at rest only."""
        self.checker.feed(self.reader.read_new())
        return self.checker.judge(self.reader.committed())

    def _busy_with(self) -> str:
        """What was written since the last look, or is still to be."""
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
            return "users wait for their embeddings"
        return "workers write" if history.outputs or history.changelog else ""
