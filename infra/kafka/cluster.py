"""Three Apache Kafka brokers on loopback, each of which can be killed and restarted on its own; also one, or five.

Every node is broker and controller. Topics have three replicas, of which two must be in sync, so the cluster loses
neither an acknowledged record nor its availability when one broker is gone. Each broker has a keeper, as a single one
has, so none outlives the process that started it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Self

import kafka

from infra.kafka.address import BrokerFailed
from infra.kafka.broker import READY_S, Broker, with_fresh_ports
from infra.kafka.node import BrokerOptions, new_cluster_id, plan_nodes

SIZE = 3
UNCLEAN = 1
"""Type of election at which a replica need not be in sync."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """Brokers that have a partition, by id."""

    all: frozenset[int]
    in_sync: frozenset[int]

    @property
    def is_whole(self) -> bool:
        """True if every replica is in sync."""
        return self.all == self.in_sync


class Cluster:
    """Running brokers, three by default; made by `start`, used as a context manager."""

    def __init__(self, brokers: Sequence[Broker]) -> None:
        self.brokers = tuple(brokers)
        self.bootstrap_servers = ",".join(broker.bootstrap_servers for broker in brokers)

    @classmethod
    def start(cls, options: BrokerOptions | None = None, size: int = SIZE) -> Self:
        """Return a cluster in which every broker answers and is registered; `options.port` is not used."""
        return with_fresh_ports(lambda: cls._start_once(options or BrokerOptions(), size))

    @classmethod
    def _start_once(cls, options: BrokerOptions, size: int) -> Self:
        nodes, cluster_id = plan_nodes(size), new_cluster_id()
        brokers: list[Broker] = []
        try:
            for node in nodes:
                brokers.append(Broker.launch(options, node, nodes, cluster_id))
            cluster = cls(brokers)
            cluster.wait_ready()
        except BaseException:
            _stop(brokers)
            raise
        return cluster

    def wait_ready(self) -> None:
        """Return when every broker answers and the cluster counts all of them."""
        deadline_s = time.monotonic() + READY_S
        for broker in self.brokers:
            broker.wait_ready()
        while (found := self._registered()) < len(self.brokers):
            if time.monotonic() > deadline_s:
                detail = f"{found} of {len(self.brokers)} brokers are registered after {READY_S:.0f} s"
                raise BrokerFailed("the cluster did not form", detail, "see that memory and CPU suffice")
            time.sleep(0.1)

    def leader(self, topic: str, partition: int) -> Broker:
        """Return the broker that leads a partition."""
        leader = self._described(topic, partition)["leader_id"]
        (broker,) = (broker for broker in self.brokers if broker.id == leader)
        return broker

    def replicas(self, topic: str, partition: int) -> Replicas:
        """Return the brokers that have a partition."""
        return _replicas(self._described(topic, partition))

    def place(self, topic: str, partition: int, brokers: Sequence[Broker]) -> None:
        """Begin to move a partition to these brokers, the first of which is its preferred leader."""
        tp = kafka.TopicPartition(topic, partition)
        with self._admin() as admin:
            problem = admin.alter_partition_reassignments({tp: [broker.id for broker in brokers]}).get(tp)
        if problem is not None:
            raise BrokerFailed(
                f"{topic}, partition {partition}, cannot be moved", str(problem), "see the brokers' logs"
            )

    def elect_unclean(self, topic: str, partition: int) -> None:
        """Make a replica that is not in sync the leader of a partition without one: acknowledged records are lost."""
        with self._admin() as admin:
            admin.elect_leaders(UNCLEAN, {topic: [partition]})

    def is_in_sync(self) -> bool:
        """Return whether every partition of every topic has all its replicas in sync."""
        with self._admin() as admin:
            topics = admin.describe_topics()
        return all(_replicas(each).is_whole for topic in topics for each in topic["partitions"])

    def stop(self) -> None:
        """Kill the brokers and remove their data; safe to call twice."""
        _stop(self.brokers)

    def __enter__(self) -> Self:
        """Return the cluster; leaving the block stops it."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop the cluster."""
        self.stop()

    def _described(self, topic: str, partition: int) -> Mapping[str, Any]:
        with self._admin() as admin:
            (described,) = admin.describe_topics([topic])
        (found,) = (each for each in described["partitions"] if each["partition_index"] == partition)
        return found  # type: ignore[no-any-return]

    def _registered(self) -> int:
        with self._admin() as admin:
            return len(admin.describe_cluster()["brokers"])

    def _admin(self) -> closing[Any]:
        return closing(kafka.KafkaAdminClient(bootstrap_servers=self.bootstrap_servers))


def _replicas(described: Mapping[str, Any]) -> Replicas:
    return Replicas(frozenset(described["replica_nodes"]), frozenset(described["isr_nodes"]))


def _stop(brokers: Sequence[Broker]) -> None:
    """Kill before stopping: the last nodes to stop in order would wait for a quorum that is gone."""
    for broker in brokers:
        if broker.is_running():
            broker.kill()
    for broker in brokers:
        broker.stop()
