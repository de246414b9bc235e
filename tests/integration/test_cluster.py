"""A deployment on three brokers, one of which is killed."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from infra.harness.deployment import deploy
from infra.harness.run import Run
from infra.harness.workload import Workload, WorkloadOptions
from infra.kafka.cluster import SIZE, Cluster

pytestmark = [pytest.mark.broker, pytest.mark.slow]
SEED = 20_241
REST_S = 60.0


def test_a_worker_survives_the_death_of_a_leader(topic_prefix: str, tmp_path: Path) -> None:
    """When the leader of a source partition is killed, two of three replicas carry on and every invariant holds."""
    with (
        Cluster.start() as cluster,
        Run(deploy(tmp_path, cluster.bootstrap_servers, topic_prefix, brokers=SIZE)) as run,
    ):
        topics = run.deployment.settings.topics
        workload = Workload(run.deployment.settings, SEED, users=200, options=WorkloadOptions(rate=300))
        workload.start()
        run.supervisor.scale(1)
        run.wait_until(lambda: bool(run.reader.read_all(topics.embeddings)))
        begun_ms = time.time_ns() // 1_000_000
        leader = cluster.leader(topics.actions, 0)
        leader.kill()
        assert run.wait_resumed() < math.inf
        assert cluster.leader(topics.actions, 0).id != leader.id
        run.wait(2)
        workload.stop()
        run.explain(begun_ms)
        assert run.rest(REST_S), f"{run.busy_with}\n{run.supervisor.output(0)[-3_000:]}"
        verdict = run.judge()
        assert [str(violation) for violation in verdict.violations] == []
        assert verdict.counts["embeddings"] > 0
        assert not leader.is_running()
        assert not run.supervisor.exits, "the worker was to survive in the same process"
