"""Processes that are measured: started with a log of their own, asked from outside how far they are, stopped.

How far a process is tells the broker: the offsets that its consumer group has committed. Asking costs the process
nothing. One that commits none is asked for its own count over HTTP.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import kafka
from kafka.errors import RetriableError

from infra.errors import InfraError
from infra.harness.reporting import cpu_seconds

POLL_S = 0.05
STOP_S = 30.0


class ContestantFailed(InfraError):
    """A measured process ended, or did not get on in time."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A program on the job: how it is run, and what it reads."""

    name: str
    topic: str
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    """Working folder; its log is written there."""
    applied: Callable[[], int]
    """Events that are applied so far, durably so once `settle_s` have passed."""
    settle_s: float = 0.5


@dataclass(slots=True)
class Running:
    """A contestant under way."""

    contestant: Contestant
    process: subprocess.Popen[bytes]
    started_s: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, contestant: Contestant) -> Running:
        contestant.folder.mkdir(parents=True, exist_ok=True)
        with (contestant.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                list(contestant.command),
                env=dict(contestant.environment),
                cwd=contestant.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return cls(contestant, process)

    @property
    def cpu_s(self) -> float:
        return cpu_seconds(self.process.pid)

    def wait_applied(self, events: int, timeout_s: float) -> None:
        """Return when `events` in all are durably applied; raises `ContestantFailed`."""
        self.wait_until(lambda: self.contestant.applied() >= events, f"{events:,} events applied", timeout_s)

    def wait_until(self, reached: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Return when `reached()` is true; raises `ContestantFailed`."""
        deadline_s = time.monotonic() + timeout_s
        while not reached():
            if self.process.poll() is not None:
                raise self._failure(f"ended with exit code {self.process.returncode}")
            if time.monotonic() > deadline_s:
                raise self._failure(f"has not reached {what} within {timeout_s:.0f} s")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for one that does not heed it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _failure(self, what: str) -> ContestantFailed:
        log = self.contestant.folder / "log"
        lines = log.read_text(errors="replace").strip().splitlines()
        said = lines[-1][:300] if lines else "it said nothing"
        return ContestantFailed(f"{self.contestant.name} {what}", said, f"see {log}")


def committed(admin: kafka.KafkaAdminClient, group: str, topic: str) -> int:
    """Events of `topic` whose offsets `group` has committed; its partitions begin at 0."""
    try:
        offsets = admin.list_group_offsets({group: None})[group]
    except RetriableError:  # the first question about any group makes the broker create the topic of offsets
        return 0
    return sum(max(0, at.offset) for partition, at in offsets.items() if partition.topic == topic)


def sample(text: str, name: str) -> float:
    """The sum of one metric over its labels, in Prometheus' text format; 0 where it is not there.

    >>> sample('a_total{p="0"} 2.0\\na_total{p="1"} 3.0\\na_total_more 9.0', "a_total")
    5.0
    """
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return sum(float(value) for labelled, _, value in lines if labelled.partition("{")[0] == name)


def scrape(port: int) -> str:
    """What `/metrics` on loopback says; empty while nobody listens there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
            return text
    except OSError:
        return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
