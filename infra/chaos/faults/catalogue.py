"""Name every fault, with the consequences it may have, and define which two may strike together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from infra.chaos.fault_context import FaultContext, Steps
from infra.chaos.faults import broker, changelog, cluster, disk, encoder, input, limits, source, transactions, workers
from infra.harness.supervisor import ABORTED, CANNOT_START


class Group(Enum):
    """Group of faults that never strike together, because they would undo each other."""

    WORKERS = "workers"
    SCALE = "scale"
    BROKER = "broker"
    OUTPUT = "output"
    DISK = "disk"
    ENCODER = "encoder"
    LIMITS = "limits"
    INPUT = "input"
    ALONE = "alone"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault and its possible consequences."""

    name: str
    group: Group
    steps: Callable[[FaultContext], Steps]
    exits: frozenset[int] = frozenset()
    """Exit codes with which a worker may end by itself because of it."""
    explains: bool = False
    """True if outputs may be stale or repeated: a frozen worker wakes, or acknowledgements are lost."""
    once: bool = False
    """True for a long fault, which is not drawn again after its turn."""
    rest_s: float = 60.0
    """Time that the workers may take to come to rest after it."""
    brokers_min: int = 1
    """Number of brokers that it needs."""


_ABORTED = frozenset({ABORTED})
_EITHER = frozenset({ABORTED, CANNOT_START})

CATALOGUE: tuple[Fault, ...] = (
    Fault("worker-killed", Group.WORKERS, workers.killed),
    Fault("worker-terminated", Group.WORKERS, workers.terminated),
    Fault("worker-frozen-10s", Group.WORKERS, workers.frozen_10, _ABORTED, explains=True),
    Fault("broker-killed", Group.BROKER, broker.killed, _EITHER, explains=True),
    Fault("poison", Group.INPUT, input.poison),
    Fault("oversized", Group.INPUT, input.oversized),
    Fault("disorder", Group.INPUT, input.disordered),
    Fault("transactional-upstream", Group.INPUT, input.transactional),
    Fault("compressed", Group.INPUT, input.compressed),
    Fault("transaction-open", Group.INPUT, transactions.left_open),
    Fault("few-hot-users", Group.LIMITS, limits.few_hot_users),
    Fault("short-queue", Group.LIMITS, limits.short_queue),
    Fault("patient-triggers", Group.LIMITS, limits.patient_triggers),
    Fault("broker-bounced", Group.BROKER, broker.bounced, _EITHER, explains=True),
    Fault("broker-frozen-30s", Group.BROKER, broker.frozen, _EITHER, explains=True),
    Fault("source-leader-killed", Group.BROKER, cluster.source_leader_killed, explains=True, brokers_min=3),
    Fault("changelog-leader-killed", Group.BROKER, cluster.changelog_leader_killed, explains=True, brokers_min=3),
    Fault("output-leader-killed", Group.BROKER, cluster.output_leader_killed, explains=True, brokers_min=3),
    Fault("dead-letter-leader-killed", Group.BROKER, cluster.dead_letter_leader_killed, explains=True, brokers_min=3),
    Fault("offsets-leader-killed", Group.BROKER, cluster.offsets_leader_killed, explains=True, brokers_min=3),
    Fault("transactions-leader-killed", Group.BROKER, cluster.transactions_leader_killed, explains=True, brokers_min=3),
    Fault("source-leaderless-30s", Group.BROKER, cluster.source_leaderless, explains=True, brokers_min=3),
    Fault("changelog-leaderless-30s", Group.BROKER, cluster.changelog_leaderless, explains=True, brokers_min=3),
    Fault("output-leaderless-30s", Group.BROKER, cluster.output_leaderless, explains=True, brokers_min=3),
    Fault("dead-letters-leaderless-30s", Group.BROKER, cluster.dead_letters_leaderless, explains=True, brokers_min=3),
    Fault("in-sync-too-few", Group.BROKER, cluster.in_sync_too_few, explains=True, brokers_min=3),
    Fault("brokers-rolled", Group.BROKER, cluster.rolled, explains=True, brokers_min=3),
    Fault("sst-truncated", Group.DISK, disk.sst_truncated),
    Fault("sst-altered", Group.DISK, disk.sst_altered, _ABORTED),
    Fault("manifest-deleted", Group.DISK, disk.manifest_deleted),
    Fault("lock-held", Group.DISK, disk.lock_held, _ABORTED),
    Fault("disk-full", Group.DISK, disk.disk_full, _ABORTED),
    # A worker that starts while the topic takes no record of its size ends with the line that says so.
    Fault("output-refused", Group.OUTPUT, broker.output_rejected, _EITHER, explains=True),
    Fault("output-recreated", Group.OUTPUT, broker.output_recreated, _EITHER, explains=True, once=True),
    Fault("encoder-missing", Group.ENCODER, encoder.missing, _EITHER),
    Fault("encoder-corrupt", Group.ENCODER, encoder.corrupt, _EITHER),
    Fault("encoder-slow", Group.ENCODER, encoder.slow),
    Fault("encoder-nan", Group.ALONE, encoder.nan, once=True, rest_s=120.0),
    Fault("scale-1-3-1", Group.SCALE, workers.scaled_to_3),
    Fault("scale-1-4-cold", Group.SCALE, workers.scaled_to_4_cold),
    Fault("rebalance-in-restore", Group.SCALE, workers.rebalanced_in_restore),
    Fault("rebalance-in-inference", Group.ALONE, workers.rebalanced_in_inference),
    Fault("changelog-truncated", Group.ALONE, changelog.truncated, once=True),
    Fault("changelog-emptied", Group.ALONE, changelog.emptied, once=True),
    Fault("changelog-recreated", Group.ALONE, changelog.recreated, once=True),
    Fault("source-expired", Group.ALONE, source.expired, once=True),
    Fault("source-recreated", Group.ALONE, source.recreated, once=True),
    Fault("source-truncated", Group.ALONE, source.truncated, explains=True, once=True, brokers_min=3),
    Fault("unclean-election", Group.ALONE, source.unclean_election, _EITHER, explains=True, once=True, brokers_min=3),
    Fault("worker-frozen-70s", Group.WORKERS, workers.frozen_70, _ABORTED, explains=True, once=True),
    Fault("rebalances", Group.ALONE, workers.rebalanced_often, once=True),
)

BY_NAME = {fault.name: fault for fault in CATALOGUE}

PAIRED: frozenset[frozenset[Group]] = frozenset(
    frozenset(pair)
    for pair in (
        (Group.WORKERS, Group.BROKER),
        (Group.WORKERS, Group.INPUT),
        (Group.WORKERS, Group.OUTPUT),
        (Group.WORKERS, Group.DISK),
        (Group.WORKERS, Group.ENCODER),
        (Group.SCALE, Group.INPUT),
        (Group.SCALE, Group.BROKER),
        (Group.BROKER, Group.INPUT),
        (Group.BROKER, Group.ENCODER),
        (Group.DISK, Group.INPUT),
        (Group.ENCODER, Group.INPUT),
        (Group.OUTPUT, Group.INPUT),
        (Group.LIMITS, Group.INPUT),
        (Group.LIMITS, Group.BROKER),
        (Group.LIMITS, Group.WORKERS),
    )
)


def usable(brokers: int) -> list[Fault]:
    """Return the faults for which this number of brokers suffices."""
    return [fault for fault in CATALOGUE if fault.brokers_min <= brokers]


def pairs(brokers: int) -> list[tuple[Fault, Fault]]:
    """Return every pair of faults that may strike together on this number of brokers."""
    drawn = [fault for fault in usable(brokers) if not fault.once]
    return [
        (one, other)
        for index, one in enumerate(drawn)
        for other in drawn[index + 1 :]
        if frozenset((one.group, other.group)) in PAIRED
    ]
