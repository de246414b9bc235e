"""The quickstart works as printed: its blocks run in order, in an empty folder, on a broker that it starts itself.

Two things differ from what a reader types: the ports, because other tests use the default ones, and the way to the
repository's recipe. Blocks in `console` and `text` are not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from infra.harness.worker_process import Process, Program, fetch_page, free_port, running

pytestmark = [pytest.mark.broker, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/quickstart.md"
BLOCK = re.compile(r"^```(\w+) ?(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
"""A code block: its language, whether it stays in the background, and its lines."""
BLOCK_S = 60.0
STOP_S = 20.0


@dataclass(slots=True)
class Reader:
    """Somebody who follows the page: a folder, two ports, and the processes left running."""

    folder: Path
    broker_port: int = field(default_factory=free_port)
    web_port: int = field(default_factory=free_port)
    background: ExitStack = field(default_factory=ExitStack)

    def prepare(self) -> None:
        """Make the commands and the recipe available in the folder."""
        (self.folder / "encoder").symlink_to(ROOT / "encoder")
        command = self.folder / "bin/streamformer"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m infra.cli "$@"\n', encoding="utf-8")
        command.chmod(0o755)

    def environment(self) -> Mapping[str, str]:
        """Return the variables of each block; settings of the machine are left out."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("STREAMFORMER_")}
        return {
            **kept,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{self.broker_port}",
            "STREAMFORMER_WEB_PORT": str(self.web_port),
        }

    def follow(self, language: str, background: str, lines: str) -> str:
        """Run a block and return its output; a background block runs on until the end of the test."""
        lines = lines.replace("127.0.0.1:9092", f"127.0.0.1:{self.broker_port}")
        if background:
            self.start(lines)
            return ""
        command = [sys.executable, "-c", lines] if language == "python" else ["bash", "-euo", "pipefail", "-c", lines]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=BLOCK_S,
            check=False,
        )
        assert done.returncode == 0, f"{lines}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self, command: str) -> None:
        """Start a command and return when it is ready."""
        command = command.strip().replace("streamformer broker", f"streamformer broker --port {self.broker_port}")
        log = self.folder / f"{command.split()[1]}.log"
        program = Program(["bash", "-c", f"exec {command}"], log, self.environment(), self.folder, command)
        process = self.background.enter_context(running(program, grace_s=STOP_S))
        process.wait_until(self.readiness(command, process), "readiness", BLOCK_S)

    def readiness(self, command: str, process: Process) -> Callable[[], bool]:
        """Return what the page says to wait for after a command."""
        if "broker" in command:
            return lambda: f"127.0.0.1:{self.broker_port}" in process.output()
        return lambda: fetch_page(self.web_port, "/readyz")[0] == 200


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """A reader in an empty folder, whose processes end with the test."""
    reader = Reader(tmp_path)
    reader.prepare()
    with reader.background:
        yield reader


def test_the_quickstart_runs_as_printed(reader: Reader) -> None:
    """Every block succeeds and gives what the page promises: embeddings of one, two and three actions."""
    blocks = [block for block in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if block[0] in {"sh", "python"}]
    outputs = [reader.follow(*block) for block in blocks]
    tailed, printed = outputs[-2:]
    assert re.findall(r"  ann  every_n  (\d) actions  [0-9a-f]{16}  \[[-+.\d …]+\]\n", tailed) == ["1", "2"], tailed
    assert re.match(r"ann 3 actions \[", printed), printed
