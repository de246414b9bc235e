"""Each import rule of pyproject.toml detects an import that breaks it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BROKEN = {
    "infra over streams, streams over encoder": ("encoder/model.py", "import streams.errors"),
    "arrows in streams never run back up": ("streams/engine/outputs.py", "import streams.worker"),
    "the core is pure": ("streams/core/layout.py", "import time"),
    "wire knows msgspec and numpy only": ("streams/wire/actions.py", "import aiokafka"),
    "streams sees only actions": ("streams/core/merge.py", "import encoder.model"),
    "Faust in engine and app only": ("streams/ingest.py", "import faust"),
    "RocksDB in storage": ("streams/engine/table.py", "import rocksdict"),
    "torch in the encoder": ("streams/ingest.py", "import torch"),
    "prometheus-client in one file": ("streams/worker.py", "import prometheus_client"),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of the packages."""
    for package in ("streams", "encoder", "infra"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_each_rule_is_broken_by_an_import_against_it(tree: Path) -> None:
    """Every rule is reported as broken after a forbidden import for each has been added to the packages."""
    for file, line in BROKEN.values():
        with (tree / file).open("a") as source:
            source.write(f"\n{line}\n")
    report = _lint(tree)
    broken = [line for line in report.splitlines() if line.endswith("BROKEN") or "BROKEN (" in line]
    for rule in BROKEN:
        assert any(line.startswith(rule) for line in broken), f"{rule}\n{report}"


def _lint(tree: Path) -> str:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False).stdout
