"""A worker process that misbehaves costs one clear line and is never left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra.demo.worker import WorkerFailed, WorkerProcess, environment, with_values, worker_process
from streams.config.settings import Settings, load_settings


def _process(code: str, log: Path) -> WorkerProcess:
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output)
    return WorkerProcess(process, log, 1.0)


def test_a_worker_that_ends_by_itself_is_told_with_its_error_line(tmp_path: Path) -> None:
    """The error line of its log is part of the one line that the demo ends with."""
    worker = _process("import sys; sys.exit('error: no disk')", tmp_path / "log")
    while psutil.Process(worker.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with pytest.raises(WorkerFailed, match="exit status 1: error: no disk"):
        worker.stop()


def test_a_worker_that_ignores_sigterm_is_reported(tmp_path: Path) -> None:
    """Stopping takes a bounded time and says so when that was not enough."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    worker = _process(code, tmp_path / "log")
    try:
        while "up" not in (tmp_path / "log").read_text():
            worker.require()
        with pytest.raises(WorkerFailed, match="did not stop"):
            worker.stop()
    finally:
        worker.kill()


def test_leaving_the_block_ends_the_worker(tmp_path: Path) -> None:
    """Whatever happens inside the block, no process stays."""
    with pytest.raises(RuntimeError), worker_process({}, Settings(), tmp_path / "log") as worker:
        raise RuntimeError
    assert not psutil.pid_exists(worker.pid)


def test_an_interrupt_while_a_worker_is_started_is_neither_lost_nor_leaves_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An interrupt at the moment of the fork is raised once the worker is in hand, which then ends it."""
    pids = []
    spawn = subprocess.Popen

    def interrupted(*args: object, **kwargs: object) -> object:
        process = spawn(*args, **kwargs)  # type: ignore[call-overload]
        pids.append(process.pid)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt), worker_process({}, Settings(), tmp_path / "log"):
        pytest.fail("the interrupt was lost")
    assert not psutil.pid_exists(pids[0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_worker_reads_the_settings_that_the_demo_uses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Settings by environment in the worker equal those that the demo itself works with."""
    values = {"kafka.bootstrap_servers": "127.0.0.1:1", "app_id": "x", "data_dir": tmp_path, "web.port": 77}
    ours = with_values(load_settings(), values)
    for name, value in environment(values).items():
        monkeypatch.setenv(name, value)
    assert load_settings() == ours
