"""Restart the workers with tight limits or another trigger policy for a while: evictions, shedding, patience."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infra.chaos.fault_context import FaultContext, Steps
from infra.chaos.faults.workers import FAULTY_WORKER
from infra.harness.releases import ACTION_NAMES
from infra.harness.worker_process import WORKER, environment, sample

SECONDS = (10.0, 14.0)
FEW_HOT_USERS: Mapping[str, Any] = {
    "state.hot_users_max": 48,
    "state.hot_users_worker_max": 100,
    "kafka.poll_records_max": 48,
}
"""A tenth of the 500 users of a partition, or half of that for a worker with all four."""
SHORT_QUEUE: Mapping[str, Any] = {"queue.users_max": 12}
"""Fewer users than become due while a batch is encoded."""
POLICY = f"""[triggers]
every_n = 5
first_n = 1
strong = ["{ACTION_NAMES[0]}"]
session_gap_ms = 1500
cooldown_ms = 800
spread_ms = 200
"""


def few_hot_users(context: FaultContext) -> Steps:
    """Keep a tenth of the users in memory, so that users are evicted and read again all the time."""
    yield from _restarted(context, FEW_HOT_USERS, "hot_users")


def short_queue(context: FaultContext) -> Steps:
    """Let a dozen users wait for an encoder that takes a quarter of a second per batch: the others are shed."""
    slow = (*FAULTY_WORKER, "held", *WORKER[3:])
    yield from _restarted(context, SHORT_QUEUE, "shed_total", slow)


def patient_triggers(context: FaultContext) -> Steps:
    """Encode users after five actions, a strong one, or the end of their session, and never twice within 0.8 s."""
    policy = context.folder / "patient.toml"
    policy.write_text(POLICY)
    yield from _restarted(context, {"triggers.policy_file": policy}, "embeddings_published_total")


def _restarted(context: FaultContext, values: Mapping[str, Any], metric: str, command: Sequence[str] = WORKER) -> Steps:
    """Restart all workers with these settings, and with the former ones after a while; report what a metric counts."""
    supervisor = context.run.supervisor
    before = supervisor.environment
    supervisor.environment, supervisor.command = {**before, **environment(values)}, command
    try:
        _kill_all(context)
        for number in supervisor.running():
            yield from context.until_ready(number)
        yield context.rng.uniform(*SECONDS)
        counts = [
            sample(supervisor.page(number, "/metrics")[1], f"streamformer_{metric}") for number in supervisor.running()
        ]
        context.progress(f"          {metric}: {', '.join(f'{count:,.0f}' for count in counts)}")
    finally:
        supervisor.environment, supervisor.command = before, WORKER
        _kill_all(context)


def _kill_all(context: FaultContext) -> None:
    for number in context.run.supervisor.running():
        context.run.supervisor.kill(number)
