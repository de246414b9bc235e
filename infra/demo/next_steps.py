"""The commands that the demo ends with: they start from nothing and embed one action with the release of the demo."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from infra.demo.split import Split

INTRODUCTION = """\
The release stays in {release_dir}. Use it: run each command in a terminal of its own, the second when the broker has
printed its address, the third at any time after that."""


def next_steps(split: Split, release_dir: Path) -> str:
    """Return an introduction and three commands: a broker, a worker, one action and the embedding that it causes."""
    last = split.log.table.slice(len(split.log) - 1).to_pylist()[0]
    run, folder = command(), shlex.quote(os.path.relpath(release_dir))
    # The worker's disk belongs to one broker, whose data ends with it, so each start gets a new folder.
    worker = f"STREAMFORMER_DATA_DIR=$(mktemp -d) {run} worker --release {folder}"
    action = f"{shlex.quote(last['item_id'])} --action {shlex.quote(last['action'])}"
    lines = (
        f"{run} broker",
        f"{run} topics create && {worker}",
        f"{run} send me {action} && {run} tail --user me --from-beginning --count 1",
    )
    return "\n".join([INTRODUCTION.format(release_dir=folder), "", *(f"  {line}" for line in lines), ""])


def command() -> str:
    """Return the command line that runs `streamformer` as this process was run."""
    program = Path(sys.argv[0])
    if program.name != "streamformer":
        return f"{shlex.quote(sys.executable)} -m infra.cli"
    if shutil.which("streamformer") == str(program):
        return "streamformer"
    return shlex.quote(os.path.relpath(program))
