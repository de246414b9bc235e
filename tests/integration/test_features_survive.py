"""Features of a workload with late, repeated, deleted and rejected events, compared with the model after faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.harness.deployment import deploy
from infra.harness.run import Run
from infra.harness.workload import Workload, WorkloadOptions

pytestmark = [pytest.mark.broker, pytest.mark.slow]
OPTIONS = WorkloadOptions(rate=400.0, delayed=0.1, disorder=0.1, duplicates=0.05, tombstones=0.01, poison=0.02)
USERS, WORK_S, KILLS = 60, 1.2, 4
REST_S = 60.0


@pytest.mark.parametrize("kills", [0, KILLS])
def test_features_are_those_of_the_model(broker: Any, topic_prefix: str, tmp_path: Path, kills: int) -> None:
    """Every record of a sample, each user's last one and what is stored are right, also after workers were killed."""
    deployment = deploy(tmp_path, broker.bootstrap_servers, topic_prefix, features=True)
    workload = Workload(deployment.settings, seed=11, users=USERS, options=OPTIONS)
    with Run(deployment) as run:
        run.supervisor.scale(1)
        run.wait_until(lambda: run.supervisor.has_ready_partition(0))
        workload.start()
        for _ in range(max(1, kills)):
            run.wait_until(lambda: run.supervisor.has_ready_partition(0))
            run.wait(WORK_S)
            if kills:
                run.supervisor.kill(0)
        workload.stop()
        assert run.rest(REST_S), run.busy_with
        verdict = run.judge()
    assert [str(each) for each in verdict.violations[:5]] == []
    assert verdict.counts["features_of_sample"] > 10
    assert verdict.counts["features_recomputed"] == verdict.counts["features_unpacked"] > USERS / 2
    assert verdict.counts["feature_tombstones"] > 0
