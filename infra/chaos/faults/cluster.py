"""Faults of one broker among three: a leader dies, nobody leads, too few are in sync, or all restart in turn."""

from __future__ import annotations

from kafka.errors import KafkaError

from infra.chaos.checks.violations import Kind, Violation
from infra.chaos.fault_context import FaultContext, Steps, set_topic_config
from infra.kafka.broker import Broker
from infra.kafka.node import INTERNAL_PARTITIONS

OFFSETS, TRANSACTIONS = "__consumer_offsets", "__transaction_state"
AWAY_S = (3.0, 9.0)
"""Shorter and longer than the broker's session and than a worker's."""
LEADERLESS_S, SETTLED_S = 30.0, 15.0
"""Time without a leader, and the part of it after which the other partitions must be at work."""
MIN_IN_SYNC = "min.insync.replicas"


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


def source_leaderless(context: FaultContext) -> Steps:
    """Leave a partition of the input without a leader for 30 s; its events wait with their producers."""
    partition = _some_partition(context)
    with context.workload.changed(avoided=frozenset({partition})):
        yield 1.0
        yield from _leaderless(context, context.deployment.settings.topics.actions, partition)


def changelog_leaderless(context: FaultContext) -> Steps:
    """Leave a partition of the changelog without a leader for 30 s."""
    yield from _leaderless(context, context.deployment.settings.changelog_topic, _some_partition(context))


def output_leaderless(context: FaultContext) -> Steps:
    """Leave a partition of the embeddings without a leader for 30 s."""
    yield from _leaderless(context, context.deployment.settings.topics.embeddings, _some_partition(context))


def dead_letters_leaderless(context: FaultContext) -> Steps:
    """Leave a partition of the dead letters without a leader for 30 s, while one record in twenty is rejected."""
    with context.workload.changed(poison=0.05):
        yield from _leaderless(context, context.deployment.settings.topics.dead_letter, _some_partition(context))


def in_sync_too_few(context: FaultContext) -> Steps:
    """Demand three replicas in sync of all that is written, and kill one broker: nothing is acknowledged."""
    names = context.deployment.settings.topics
    topics = (context.deployment.settings.changelog_topic, names.embeddings, names.dead_letter)
    try:
        for topic in topics:
            set_topic_config(context.servers, topic, {MIN_IN_SYNC: "3"})
        broker = context.some_broker()
        broker.kill()
        yield context.rng.uniform(8.0, 15.0)
        yield from context.restart(broker)
    finally:
        for topic in topics:
            set_topic_config(context.servers, topic, {MIN_IN_SYNC: "2"})


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


def _leaderless(context: FaultContext, topic: str, partition: int) -> Steps:
    """Move a partition to one broker, kill that broker for 30 s, and give the partition its replicas back."""
    cluster, broker = context.cluster, context.some_broker()
    context.progress(f"          partition {partition} of {topic} is on broker {broker.id} alone, which is killed")
    try:
        yield from alone_on(context, topic, partition, [broker])
        broker.kill()
        yield SETTLED_S
        yield from while_others_go_on(context, partition, LEADERLESS_S - SETTLED_S)
        yield from context.restart(broker)
    finally:
        cluster.place(topic, partition, cluster.brokers)
        set_topic_config(context.servers, topic, {MIN_IN_SYNC: "2"})


def alone_on(context: FaultContext, topic: str, partition: int, brokers: list[Broker]) -> Steps:
    """Move a partition to these brokers, any of which may acknowledge alone, and wait until they have it."""
    set_topic_config(context.servers, topic, {MIN_IN_SYNC: "1"})
    context.cluster.place(topic, partition, brokers)
    wanted = frozenset(broker.id for broker in brokers)
    yield from context.until(
        lambda: (found := context.cluster.replicas(topic, partition)).is_whole and found.all == wanted,
        f"partition {partition} of {topic} was not moved",
    )


def while_others_go_on(context: FaultContext, broken: int, seconds: float) -> Steps:
    """Let time pass, and report every other partition of which nothing was committed, though its worker was left alone.

    A worker that ended in this time, or that another fault has stopped, is no witness.
    """
    supervisor, begun = context.run.supervisor, _committed(context)
    exits, workers = len(supervisor.exits), supervisor.running()
    yield seconds
    now = _committed(context)
    if not begun or not now or len(supervisor.exits) > exits or supervisor.running() != workers:
        return
    for partition in set(range(context.deployment.settings.topics.partitions)) - {broken}:
        if now.get(partition, 0) <= begun.get(partition, 0):
            detail = f"nothing was committed for {seconds:.0f} s while partition {broken} had no leader"
            context.found.append(Violation(Kind.HELD_UP, None, partition, now.get(partition, 0), detail))


def _committed(context: FaultContext) -> dict[int, int]:
    try:
        return context.run.reader.committed()
    except (KafkaError, OSError):
        return {}
