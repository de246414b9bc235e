"""Commands and tests do not depend on the signals that a shell ignores on their behalf (`nohup ... &`)."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra.harness.worker_process import Program, running

ROOT = Path(__file__).parents[3]
INTERRUPTED_BY_SIGTERM = """
import time
from infra.signals import interrupt_on_sigterm
interrupt_on_sigterm()
try:
    print("up", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
PRINTS_SIGNALS = """
import signal
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
print(*(signal.getsignal(number) is signal.SIG_IGN for number in numbers), flush=True)
"""
INTERRUPTED_BY_SIGINT = "tests/unit/infra/test_worker_process.py"


def ignoring(signals: str, *command: str) -> list[str]:
    """Return a command that a shell starts with these signals ignored, as it starts a background job."""
    return ["sh", "-c", f'trap "" {signals}; exec "$@"', "sh", *command]


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("ignored", ["USR1", "INT HUP"])
def test_sigterm_interrupts_a_background_command_too(ignored: str) -> None:
    """SIGTERM raises `KeyboardInterrupt` whether or not the shell has made the command ignore SIGINT."""
    command = ignoring(ignored, sys.executable, "-c", INTERRUPTED_BY_SIGTERM)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "interrupted\n"
    assert process.returncode == 0


@pytest.mark.usefixtures("default_signals")
def test_sigint_stays_ignored_in_a_background_command() -> None:
    """A command that starts with SIGINT ignored keeps ignoring it: Ctrl-C is meant for the foreground."""
    command = ignoring("INT", sys.executable, "-c", INTERRUPTED_BY_SIGTERM)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "interrupted\n"


def test_processes_of_a_background_command_start_with_default_signals(tmp_path: Path) -> None:
    """A process that a command starts ignores none of SIGINT, SIGTERM and SIGHUP, even if the command does."""
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        with running(Program((sys.executable, "-c", PRINTS_SIGNALS), tmp_path / "log")) as process:
            process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert process.output().split() == ["False"] * 3


@pytest.mark.slow
def test_the_tests_pass_in_the_background() -> None:
    """Tests that send and expect interrupts pass when the run itself was started with SIGINT and SIGHUP ignored."""
    pytest_command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", INTERRUPTED_BY_SIGINT)
    run = subprocess.run(ignoring("INT HUP", *pytest_command), cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2_000:]
