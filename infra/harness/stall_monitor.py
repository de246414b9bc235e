"""Watch a run from outside, as an operator's monitoring does: offsets at the broker, health pages of the workers.

A *stall* is a partition that is behind the log while its committed offset does not move. The workers' own watchdog must
notice it: a worker ends itself, or `/livez` or `/readyz` fails. A stall that stays unnoticed for longer than the
watchdog's timeout is a violation. Nothing is concluded while the broker does not answer.
"""

from __future__ import annotations

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
        self._unnoticed_max_s = run.deployment.settings.worker.watchdog_timeout_ms / 1000 + MARGIN_S
        self._stalled: dict[int, tuple[int, float]] = {}
        """Committed offset of each partition that is behind, and since when it has not moved."""
        self._noticed_s = time.monotonic()
        """Last time at which a worker was unhealthy or absent: stalls that began before have been noticed."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stall-monitor", daemon=True)
        self._found: list[Violation] = []
        self._failure: BaseException | None = None
        self.longest_stall_s = 0.0

    def __enter__(self) -> StallMonitor:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop the thread."""
        self._stopping.set()
        self._thread.join()
        self._reader.close()

    def take(self) -> list[Violation]:
        """Return the unnoticed stalls since the last call; raise the error that ended the thread, if any."""
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
            if not self._all_healthy():
                self._noticed_s = time.monotonic()
            asked_s = time.monotonic()
            try:
                committed, ends = self._reader.committed(), self._reader.ends()
            except (KafkaError, OSError):
                self._stalled.clear()
                continue
            if time.monotonic() - asked_s > ANSWER_S:  # the workers have not been looked at in this time either
                self._stalled.clear()
            else:
                self._look(committed, ends)

    def _look(self, committed: dict[int, int], ends: dict[int, int]) -> None:
        now_s, stalled = time.monotonic(), {}
        for partition, end in ends.items():
            offset = committed.get(partition, 0)
            before, since_s = self._stalled.get(partition, (offset, now_s))
            if offset < end:
                stalled[partition] = (before, since_s) if before == offset else (offset, now_s)
        self._stalled = stalled
        for partition, (offset, since_s) in list(stalled.items()):
            self.longest_stall_s = max(self.longest_stall_s, now_s - since_s)
            unnoticed_s = now_s - max(since_s, self._noticed_s)
            if unnoticed_s > self._unnoticed_max_s:
                detail = f"no commit for {now_s - since_s:.0f} s, and every worker reports that it is healthy"
                self._found.append(Violation(Kind.UNSEEN_STALL, None, partition, offset, detail))
                del stalled[partition]

    def _all_healthy(self) -> bool:
        numbers = self._supervisor.running()
        return bool(numbers) and all(self._is_healthy(number) for number in numbers)

    def _is_healthy(self, number: int) -> bool:
        try:
            return all(self._supervisor.page(number, path, ANSWER_S)[0] == 200 for path in ("/livez", "/readyz"))
        except (OSError, KeyError):  # the worker was started or removed a moment ago
            return False
