"""Faults of one broker among three: a leader dies, or all brokers restart in turn."""

from __future__ import annotations

from infra.chaos.fault_context import FaultContext, Steps
from infra.kafka.node import INTERNAL_PARTITIONS

OFFSETS, TRANSACTIONS = "__consumer_offsets", "__transaction_state"
AWAY_S = (3.0, 9.0)
"""Shorter and longer than the broker's session and than a worker's."""


def source_leader_killed(context: FaultContext) -> Steps:
    """Kill the broker that leads a partition of the input."""
    yield from _leader_killed(context, context.deployment.settings.topics.actions, _some_partition(context))


def changelog_leader_killed(context: FaultContext) -> Steps:
    """Kill the broker that leads a partition of the changelog."""
    yield from _leader_killed(context, context.deployment.settings.changelog_topic, _some_partition(context))


def output_leader_killed(context: FaultContext) -> Steps:
    """Kill the broker that leads a partition of the embeddings."""
    yield from _leader_killed(context, context.deployment.settings.topics.embeddings, _some_partition(context))


def dead_letter_leader_killed(context: FaultContext) -> Steps:
    """Kill the broker that leads a partition of the dead letters, while one record in ten is rejected."""
    with context.workload.changed(poison=0.1):
        yield 2.0
        yield from _leader_killed(context, context.deployment.settings.topics.dead_letter, _some_partition(context))


def offsets_leader_killed(context: FaultContext) -> Steps:
    """Kill the coordinator of the consumer group."""
    yield from _leader_killed(context, OFFSETS, internal_partition(context.deployment.settings.app_id))


def transactions_leader_killed(context: FaultContext) -> Steps:
    """Kill the coordinator of some of the transactions."""
    yield from _leader_killed(context, TRANSACTIONS, context.rng.randrange(INTERNAL_PARTITIONS))


def rolled(context: FaultContext) -> Steps:
    """Restart all brokers in turn, as an upgrade does: each when the replicas are in sync again."""
    for broker in context.cluster.brokers:
        yield from context.restart(broker)
        yield from context.until_in_sync()


def internal_partition(name: str) -> int:
    """Return the partition of an internal topic that a group or transactional id belongs to: its hash in Java."""
    hashed = 0
    for char in name:
        hashed = (31 * hashed + ord(char)) & 0xFFFFFFFF
    signed = hashed - (1 << 32) if hashed >= 1 << 31 else hashed
    return (0 if signed == -(1 << 31) else abs(signed)) % INTERNAL_PARTITIONS


def _some_partition(context: FaultContext) -> int:
    return context.rng.randrange(context.deployment.settings.topics.partitions)


def _leader_killed(context: FaultContext, topic: str, partition: int) -> Steps:
    leader = context.cluster.leader(topic, partition)
    context.progress(f"          broker {leader.id} leads partition {partition} of {topic}, and is killed")
    leader.kill()
    yield context.rng.uniform(*AWAY_S)
    yield from context.restart(leader)
