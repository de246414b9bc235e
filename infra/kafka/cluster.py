"""Three Apache Kafka brokers on loopback, each of which can be killed and restarted on its own.

Every node is broker and controller. Topics have three replicas, of which two must be in sync, so the cluster loses
neither an acknowledged record nor its availability when one broker is gone. Each broker has a keeper, as a single one
has, so none outlives the process that started it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any, Self

import kafka

from infra.kafka.address import BrokerFailed
from infra.kafka.broker import READY_S, Broker, with_fresh_ports
from infra.kafka.node import BrokerOptions, new_cluster_id, plan_nodes

SIZE = 3


class Cluster:
    """Three running brokers; made by `start`, used as a context manager."""

    def __init__(self, brokers: Sequence[Broker]) -> None:
        self.brokers = tuple(brokers)
        self.bootstrap_servers = ",".join(broker.bootstrap_servers for broker in brokers)

    @classmethod
    def start(cls, options: BrokerOptions | None = None) -> Self:
        """Return a cluster in which every broker answers and is registered; `options.port` is not used."""
        return with_fresh_ports(lambda: cls._start_once(options or BrokerOptions()))

    @classmethod
    def _start_once(cls, options: BrokerOptions) -> Self:
        nodes, cluster_id = plan_nodes(SIZE), new_cluster_id()
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
        while (found := self._registered()) < SIZE:
            if time.monotonic() > deadline_s:
                detail = f"{found} of {SIZE} brokers are registered after {READY_S:.0f} s"
                raise BrokerFailed("the cluster did not form", detail, "see that memory and CPU suffice")
            time.sleep(0.1)

    def leader(self, topic: str, partition: int) -> Broker:
        """Return the broker that leads a partition."""
        with self._admin() as admin:
            (described,) = admin.describe_topics([topic])
        (leader,) = (each["leader_id"] for each in described["partitions"] if each["partition_index"] == partition)
        (broker,) = (broker for broker in self.brokers if broker.id == leader)
        return broker

    def stop(self) -> None:
        """Kill the brokers and remove their data; safe to call twice."""
        _stop(self.brokers)

    def __enter__(self) -> Self:
        """Return the cluster; leaving the block stops it."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop the cluster."""
        self.stop()

    def _registered(self) -> int:
        with self._admin() as admin:
            return len(admin.describe_cluster()["brokers"])

    def _admin(self) -> closing[Any]:
        return closing(kafka.KafkaAdminClient(bootstrap_servers=self.bootstrap_servers))


def _stop(brokers: Sequence[Broker]) -> None:
    """Kill before stopping: the last nodes to stop in order would wait for a quorum that is gone."""
    for broker in brokers:
        if broker.is_running():
            broker.kill()
    for broker in brokers:
        broker.stop()
