"""A real Apache Kafka in KRaft mode on loopback, from Python packages alone.

`Broker.start()` formats a temporary data folder, starts the broker under a keeper process (see `keeper.py`) and
returns when it answers. The broker and its folder are removed on `stop`, at the end of the `with` block, and when the
process that started it dies in any way, SIGKILL included. `broker_or_external` honours `KAFKA_BOOTSTRAP_SERVERS`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self, TypeVar

import kafka
from kafka.errors import KafkaError

from infra.errors import InfraError
from infra.kafka import keeper
from infra.kafka.address import ANSWER_MS, BrokerFailed, require_broker, require_listener
from infra.kafka.jars import kafka_jars
from infra.kafka.node import HOST, BrokerOptions, Node, java_command, new_cluster_id, plan_nodes, prepare, reason

READY_S = 60.0
PORT_ATTEMPTS = 3
T = TypeVar("T")


class Broker:
    """A running broker, created by `start` and used as a context manager."""

    def __init__(self, process: subprocess.Popen[str], node: Node, folder: Path) -> None:
        self.id = node.id
        self.bootstrap_servers = f"{HOST}:{node.port}"
        self.secured_servers = f"{HOST}:{node.secured_port}"
        """Address at which `BrokerOptions.users` log in; nothing answers there if there are none."""
        self.folder = folder
        self.pid = 0
        self._process = process

    @classmethod
    def start(cls, options: BrokerOptions | None = None) -> Self:
        """Return a broker that answers; raise `BrokerFailed` or `JarsUnavailable`, leaving nothing behind."""
        options = options or BrokerOptions()
        return with_fresh_ports(lambda: cls._start_once(options), 1 if options.port else PORT_ATTEMPTS)

    @classmethod
    def _start_once(cls, options: BrokerOptions) -> Self:
        nodes = plan_nodes(1, options.port)
        broker = cls.launch(options, nodes[0], nodes, new_cluster_id())
        try:
            broker.wait_ready()
        except BaseException:
            broker.stop()
            raise
        return broker

    @classmethod
    def launch(cls, options: BrokerOptions, node: Node, nodes: Sequence[Node], cluster_id: str) -> Self:
        """Start one node of a cluster and return at once; `wait_ready` waits until it answers."""
        classpath = ":".join(str(jar) for jar in kafka_jars())
        folder = prepare(options, node, nodes, cluster_id, classpath)
        broker = cls(_spawn_keeper(folder, java_command(options, folder, classpath)), node, folder)
        try:
            broker.pid = broker._order("start")
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
        """Send SIGKILL; data and port are kept for `restart`."""
        self._order("kill")

    def restart(self) -> None:
        """Stop the broker in order if it runs, start it on the same data and port, and return when it answers."""
        self._order("stop")
        self.pid = self._order("start")
        self.wait_ready()

    def wait_ready(self) -> None:
        """Return when the broker answers; raise `BrokerFailed` if it ends before or the time is up."""
        deadline_s = time.monotonic() + READY_S
        while not _answers(self.bootstrap_servers):
            if not self.is_running():
                raise self._failure("the broker stopped while starting")
            if time.monotonic() > deadline_s:
                raise self._failure(f"the broker did not answer within {READY_S:.0f} s")
            time.sleep(0.05)

    def is_running(self) -> bool:
        """Return False once the process has ended, even if its keeper has not noticed yet."""
        return _is_running(self.pid)

    def last_error(self) -> str:
        """Return the line of the broker's log that best explains why it ended."""
        return reason(self._log())

    def __enter__(self) -> Self:
        """Return the broker; leaving the block stops it."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop the broker."""
        self.stop()

    def _order(self, order: str) -> int:
        stdin, stdout = _pipes(self._process)
        stdin.write(order + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            raise BrokerFailed("the broker's keeper is gone", f"exit status {self._process.wait()}", "start it again")
        return int(answer)

    def _failure(self, what: str) -> InfraError:
        log = self._log()
        if "Address already in use" in log:
            return _PortTaken(f"the address {self.bootstrap_servers} is in use", "another process has it", "")
        return BrokerFailed(what, reason(log), "see that memory and disk suffice, and run it again")

    def _log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")


class _PortTaken(BrokerFailed):
    """Another process took the port after it had been chosen."""


def with_fresh_ports(start: Callable[[], T], attempts: int = PORT_ATTEMPTS) -> T:
    """Call `start`, which chooses its ports, and call it again if another process has taken one of them."""
    for attempt in range(1, attempts + 1):
        try:
            return start()
        except _PortTaken as error:
            if attempt == attempts:
                raise BrokerFailed(
                    "cannot start the broker", str(error), "choose another port or stop what uses it"
                ) from error
    raise AssertionError("unreachable")


@dataclass(frozen=True, slots=True)
class ExternalBroker:
    """A broker outside this project's control."""

    bootstrap_servers: str


@contextmanager
def broker_or_external(options: BrokerOptions | None = None) -> Iterator[Broker | ExternalBroker]:
    """Yield the broker at `KAFKA_BOOTSTRAP_SERVERS` if that is set, otherwise one of our own until the block ends."""
    if address := os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        require_broker({"bootstrap_servers": address})
        yield ExternalBroker(address)
        return
    with Broker.start(options) as broker:
        yield broker


def _spawn_keeper(folder: Path, command: list[str]) -> subprocess.Popen[str]:
    """Start the keeper in a session of its own: Ctrl-C reaches only the parent, which then stops it in order."""
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
    """Return False for a zombie too, which the keeper has not yet waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
