"""Watches a run from outside, as an operator's monitoring would: positions at the broker, health at the workers.

A *stall* is a partition whose committed offset stands still while it is behind the log. The workers' own watchdog must
see it: a worker ends itself, or `/livez` or `/readyz` says no. A stall that nobody has seen for longer than the
watchdog's time is a violation. While the broker does not answer nothing can be said, and nothing is.
"""

from __future__ import annotations

import http.client
import threading
import time

from kafka.errors import KafkaError

from infra.chaos.checks.violations import Kind, Violation
from infra.harness.run import Run
from infra.harness.topic_reader import HistoryReader

LOOK_EVERY_S = 1.0
ANSWER_S = 2.0
MARGIN_S = 10.0


class StallMonitor:
    """Looks every second, in a thread of its own."""

    def __init__(self, run: Run) -> None:
        self._supervisor, self._reader = run.supervisor, HistoryReader(run.deployment.settings)
        self._unseen_max_s = run.deployment.settings.worker.watchdog_timeout_ms / 1000 + MARGIN_S
        self._stands: dict[int, tuple[int, float]] = {}
        """Partition that is behind -> (committed offset, since when)."""
        self._seen_s = time.monotonic()
        """When a worker last was not well, or was not there: what stands still since then has been seen."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self._found: list[Violation] = []
        self._failure: BaseException | None = None
        self.longest_stall_s = 0.0

    def __enter__(self) -> StallMonitor:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._reader.close()

    def take(self) -> list[Violation]:
        """Stalls that went unseen since the last call; raises what ended the monitor, if anything did."""
        if self._failure is not None:
            raise self._failure
        found, self._found = self._found, []
        return found

    def _run(self) -> None:
        try:
            self._monitor()
        except BaseException as error:
            self._failure = error

    def _monitor(self) -> None:
        while not self._stopping.wait(LOOK_EVERY_S):
            if not self._all_well():
                self._seen_s = time.monotonic()
            asked_s = time.monotonic()
            try:
                committed, ends = self._reader.committed(), self._reader.ends()
            except (KafkaError, OSError):
                self._stands.clear()
                continue
            if time.monotonic() - asked_s > ANSWER_S:  # meanwhile nobody has looked at the workers either
                self._stands.clear()
            else:
                self._look(committed, ends)

    def _look(self, committed: dict[int, int], ends: dict[int, int]) -> None:
        now_s, stands = time.monotonic(), {}
        for partition, end in ends.items():
            offset = committed.get(partition, 0)
            stood, since_s = self._stands.get(partition, (offset, now_s))
            if offset < end:
                stands[partition] = (stood, since_s) if stood == offset else (offset, now_s)
        self._stands = stands
        for partition, (offset, since_s) in list(stands.items()):
            self.longest_stall_s = max(self.longest_stall_s, now_s - since_s)
            unseen_s = now_s - max(since_s, self._seen_s)
            if unseen_s > self._unseen_max_s:
                detail = f"no commit for {now_s - since_s:.0f} s, and every worker says it is well"
                self._found.append(Violation(Kind.UNSEEN_STALL, None, partition, offset, detail))
                del stands[partition]

    def _all_well(self) -> bool:
        numbers = self._supervisor.running()
        return bool(numbers) and all(self._is_well(number) for number in numbers)

    def _is_well(self, number: int) -> bool:
        try:
            port = self._supervisor.port(number)
            return port is not None and all(_status(port, path) == 200 for path in ("/livez", "/readyz"))
        except (OSError, http.client.HTTPException, KeyError):
            return False


def _status(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()
