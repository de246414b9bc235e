"""One run under judgement: a stage, its workers, and the checker that reads along.

with Trial(stage) as trial:
    trial.fleet.scale(1)
    ...                        # traffic, faults
    trial.rest(30)             # until everything is processed and published
    verdict = trial.judge()
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from kafka.errors import KafkaError

from infra.chaos.checks.checker import Checker, Rules, Verdict
from infra.chaos.checks.violations import Explained
from infra.harness.deployment import Stage
from infra.harness.supervisor import WORKER, Fleet
from infra.harness.topic_reader import Gatherer

LOOK_EVERY_S = 0.3
QUIET_S = 1.2
"""More than two checkpoint intervals: what became dirty by the last acknowledgements is written too."""


class Trial:
    """A stage at work."""

    def __init__(self, stage: Stage, command: Sequence[str] = WORKER) -> None:
        self.stage = stage
        self.fleet = Fleet(stage, command)
        self.explained: list[Explained] = []
        """Add to it when a fault may make outputs stale or repeated."""
        self.busy_with = ""
        """What was left to do when `rest` last looked."""
        self.gatherer = Gatherer(stage.settings)
        oracle = stage.oracle()
        state, topic = stage.settings.state, stage.settings.topics.actions
        rules = Rules(state.sequence_length, state.chunk_length, oracle.version, topic, self.explained)
        self.checker = Checker(rules, oracle)

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.fleet.close()
        self.gatherer.close()

    def rest(self, timeout_s: float) -> bool:
        """Keep the workers running until nothing is left to do; False, and why in `busy_with`, when that took longer.

        Traffic has stopped.
        """
        deadline_s, quiet_since_s = time.monotonic() + timeout_s, time.monotonic()
        while time.monotonic() < deadline_s:
            self.fleet.tick()
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
        """Hold everything against the truth; at rest only."""
        self.checker.feed(self.gatherer.gather())
        return self.checker.judge(self.gatherer.committed())

    def _busy_with(self) -> str:
        """What was written since the last look, or is still to be."""
        try:
            evidence = self.gatherer.gather()
            self.checker.feed(evidence)
            committed = self.gatherer.committed()
        except KafkaError as error:
            return f"the broker does not answer: {error!r}"
        for partition, end in self.checker.truth.ends.items():
            if committed.get(partition, 0) < end:
                return f"partition {partition} is committed up to {committed.get(partition, 0)} of {end}"
        if self.checker.is_behind():
            return "users wait for their embeddings"
        return "workers write" if evidence.outputs or evidence.changelog else ""
