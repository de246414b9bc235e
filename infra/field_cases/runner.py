"""Run cases side by side, with at most two workers at a time on the machine."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from infra.field_cases.case import Case, CaseFailed, Numbers, Result
from infra.field_cases.field import Field
from infra.kafka.broker import broker_or_external
from infra.kafka.cluster import Cluster

WORKERS_MAX = 2
DETAIL_CHARS_MAX = 400


@dataclass
class Slots:
    """Places for workers; a case takes all that it needs at once."""

    free: int = WORKERS_MAX
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Hold `count` places until the end of the block."""
        with self._changed:
            self._changed.wait_for(lambda: self.free >= count)
            self.free -= count
        try:
            yield
        finally:
            with self._changed:
                self.free += count
                self._changed.notify_all()


class SharedCluster:
    """Three brokers, started when the first case needs them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._cluster: Cluster | None = None

    def __call__(self) -> Cluster:
        """Return the cluster, in which every broker runs."""
        if self._cluster is None:
            self._cluster = self._stack.enter_context(Cluster.start())
        for broker in self._cluster.brokers:
            if not broker.is_running():
                broker.restart()
        self._cluster.wait_ready()
        return self._cluster


def run_cases(cases: Sequence[Case], tree: Path | None, on_result: Callable[[Result], None]) -> list[Result]:
    """Run cases and return their results by number; those that need three brokers or two workers run alone."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamformer-field-")))
        servers = stack.enter_context(broker_or_external()).bootstrap_servers
        cluster, slots, lock = SharedCluster(stack), Slots(), threading.Lock()

        def run(case: Case) -> Result:
            with slots.taken(WORKERS_MAX if case.brokers > 1 else case.workers):
                result = run_case(case, Field(case.number, servers, folder, tree, cluster))
            with lock:
                on_result(result)
            return result

        alone = [case for case in cases if case.workers > 1 or case.brokers > 1]
        together = [case for case in cases if case not in alone]
        pool = stack.enter_context(ThreadPoolExecutor(WORKERS_MAX))
        results = [*pool.map(run, together), *map(run, alone)]
    return sorted(results, key=lambda result: result.case.number)


def run_case(case: Case, ground: Field) -> Result:
    """Run one case on its ground and return its result; a defect of the case itself counts as a failure too."""
    begun_s, numbers, failure = time.monotonic(), _none(), ""
    try:
        with ground:
            numbers = case.play(ground)
    except CaseFailed as error:
        failure = _one_line(str(error))
    except Exception as error:
        failure = _one_line(f"{type(error).__name__}: {error}")
    return Result(case, time.monotonic() - begun_s, numbers, failure)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:DETAIL_CHARS_MAX]


def _none() -> Numbers:
    return {}
