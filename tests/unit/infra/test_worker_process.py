"""A process that misbehaves costs one clear line and is never left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra.harness.worker_process import (
    Process,
    ProcessFailed,
    Program,
    environment,
    running,
    with_values,
    worker_program,
)
from streams.config.settings import load_settings

IGNORES_SIGTERM = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('up', flush=True)
time.sleep(60)
"""


def _program(code: str, folder: Path) -> Program:
    return Program((sys.executable, "-c", code), folder / "log")


def test_a_process_that_ends_by_itself_is_reported_with_its_error_line(tmp_path: Path) -> None:
    """The error line of its log is part of the one line that the command ends with."""
    process = Process.start(_program("import sys; sys.exit('error: no disk')", tmp_path))
    while process.exit_code() is None:
        time.sleep(0.01)
    with pytest.raises(ProcessFailed, match="exit status 1: error: no disk"):
        process.stop_in_order(1.0)


def test_a_process_that_ignores_sigterm_is_reported(tmp_path: Path) -> None:
    """Stopping takes a bounded time, and the error reports that it was not enough; the process has been killed."""
    with running(_program(IGNORES_SIGTERM, tmp_path)) as process:
        process.wait_until(lambda: "up" in process.output(), "its first line", 30)
        with pytest.raises(ProcessFailed, match="did not stop"):
            process.stop_in_order(0.5)
        assert process.exit_code() == -signal.SIGKILL


def test_waiting_ends_when_the_process_does_or_the_time_is_up(tmp_path: Path) -> None:
    """A process that has ended is not waited for; one that makes no progress is waited for so long and no longer."""
    with (
        running(_program("raise SystemExit(3)", tmp_path)) as process,
        pytest.raises(ProcessFailed, match="exit status 3"),
    ):
        process.wait_until(lambda: False, "anything", 30)
    with (
        running(_program("import time; time.sleep(60)", tmp_path)) as process,
        pytest.raises(ProcessFailed, match="has not reached anything: within 0 s"),
    ):
        process.wait_until(lambda: False, "anything", 0.1)


def test_leaving_the_block_ends_the_process(tmp_path: Path) -> None:
    """No process is left after the block, also when the block fails."""
    with pytest.raises(RuntimeError), running(worker_program({}, tmp_path / "log")) as worker:
        raise RuntimeError
    assert not psutil.pid_exists(worker.pid)


def test_a_process_gets_the_time_to_stop_that_the_block_grants(tmp_path: Path) -> None:
    """A block with grace ends with SIGTERM, which the process can handle."""
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(7)); print('up', flush=True); {}"
    with running(_program(code.format("time.sleep(60)"), tmp_path), grace_s=30) as process:
        process.wait_until(lambda: "up" in process.output(), "its first line", 30)
    assert process.exit_code() == 7


def test_each_start_has_its_own_output(tmp_path: Path) -> None:
    """The log of several starts is one file, in which each process finds only its own lines."""
    outputs = []
    for word in ("first", "second"):
        process = Process.start(_program(f"print('{word}')", tmp_path))
        process.wait()
        outputs.append(process.output().split())
    assert outputs == [["first"], ["second"]]
    assert (tmp_path / "log").read_text().split() == ["first", "second"]


@pytest.mark.usefixtures("default_signals")
def test_an_interrupt_while_a_process_is_started_is_neither_lost_nor_leaves_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An interrupt at the moment of the fork is raised once the process is in hand, which then ends."""
    pids = []
    spawn = subprocess.Popen

    def interrupted(*args: object, **kwargs: object) -> object:
        process = spawn(*args, **kwargs)  # type: ignore[call-overload]
        pids.append(process.pid)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt), running(worker_program({}, tmp_path / "log")):
        pytest.fail("the interrupt was lost")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not psutil.pid_exists(pids[0])


def test_a_worker_reads_the_settings_that_its_starter_uses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Settings from the environment of the worker equal those that the starter works with."""
    values = {"kafka.bootstrap_servers": "127.0.0.1:1", "app_id": "x", "data_dir": tmp_path, "web.port": 77}
    ours = with_values(load_settings(), values)
    for name, value in environment(values).items():
        monkeypatch.setenv(name, value)
    assert load_settings() == ours
