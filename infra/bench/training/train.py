"""`make bench-train`: how fast an encoder trains, against RecTools on the same log, machine and size.

RecTools takes part twice: `SASRecModel`, and the flat network of its `fast_transformers`, its newest and fastest path.

The log is the trained part of MovieLens-1M, leave-one-out. Both have two layers of the same width and heads, the same
longest sequence, a softmax over the whole catalogue and one thread. Where the machine multiplies faster in bfloat16
everybody takes part in both precisions, and the better one of ours stands against the best rival. What is counted is
*targets*: actions that a step predicts, padding not among them. Rounds are interleaved: ours, then each rival, a slice
of steps each, after a warm-up; speeds are medians over the rounds in targets per CPU-second of the process.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import torch
import typer

from encoder.data.log import ActionLog, LogColumns, read_log
from encoder.data.split import make_split
from encoder.distributed import ProcessGroup
from encoder.hardware import faster_precision
from encoder.training.recipe import Recipe, read_recipe
from encoder.training.run import make_trainer
from infra.bench.training.ml1m import RUNS
from infra.datasets.movielens import movielens_1m
from infra.harness.reporting import Spread, agreed_ratio, console, machine, print_result, print_table, run_command

OURS = "streamformer"
BASELINES = Path(__file__).parents[1] / "baselines"
PEERS_PYTHON = Path(".venv-peers/bin/python")
ROUNDS = 5
STEPS = 6
"""Of ours in a slice."""
PEER_STEPS, PEER_BATCH = 4, 32
"""Sequences of a peer's batch, so that a step reads about as many places as ours."""
UNFAIR = """What is not equal, before any figure:
- for RecTools: it pads every sequence to the longest, ours sorts pieces of histories by length; Lightning drives
  SASRecModel; both predict no more than the last {length} actions of a user, ours all of them.
- for ours: SASRecModel's feed-forward layers are as wide as the model, ours four times (the flat network's too); ours
  reads time and action types as well and has a head of the same width behind its layers."""
PATHS = {"rectools-sasrec": "sasrec", "rectools-flat": "flat"}
Precision = Literal["fp32", "bf16"]


@dataclass(slots=True)
class Entrant:
    """A name and what was measured: targets per CPU-second and per second on the clock, of each round."""

    name: str
    per_cpu_s: list[float] = field(default_factory=list)
    per_wall_s: list[float] = field(default_factory=list)

    def add(self, targets: int, cpu_s: float, wall_s: float) -> None:
        self.per_cpu_s.append(targets / cpu_s)
        self.per_wall_s.append(targets / wall_s)

    def median(self) -> float:
        """Targets per CPU-second."""
        return Spread(tuple(self.per_cpu_s)).median


class Ours:
    """The streaming encoder's trainer, a slice of steps at a time."""

    def __init__(self, log: ActionLog, recipe: Recipe) -> None:
        self._trainer = make_trainer(log, recipe, ProcessGroup())
        self._batches = self._trainer.batches()
        for _ in range(2):
            self._trainer.train_step(next(self._batches), 0.0)

    def slice(self) -> tuple[int, float, float]:
        """Targets, CPU seconds and wall seconds of some steps."""
        wall_s, cpu_s, before = time.perf_counter(), time.process_time(), self._trainer.targets
        for _ in range(STEPS):
            self._trainer.train_step(next(self._batches), 0.0)
        return self._trainer.targets - before, time.process_time() - cpu_s, time.perf_counter() - wall_s


class Peer:
    """RecTools in a process of its own, which trains a slice for each line it is sent."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def line(self) -> str:
        """The next line of the process; raises `OSError` with its last words if it has ended."""
        assert self._process.stdout is not None
        if text := self._process.stdout.readline():
            return text.strip()
        assert self._process.stderr is not None
        raise OSError((self._process.stderr.read().strip().splitlines() or ["it said nothing"])[-1])

    def slice(self) -> tuple[int, float, float]:
        """Targets, CPU seconds and wall seconds of some steps."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        measured = json.loads(self.line())
        return measured["targets"], measured["cpu_s"], measured["wall_s"]


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Slices of each.")] = ROUNDS,
    peer: Annotated[bool, typer.Option("--peer/--no-peer", help="Measure RecTools too.")] = True,
) -> None:
    """Measure targets per CPU-second of training, ours and RecTools'."""
    torch.set_num_threads(1)
    recipe = read_recipe(RUNS / "ml1m_streaming.toml")
    precisions: list[Precision] = ["fp32", "bf16"] if faster_precision() is torch.bfloat16 else ["fp32"]
    split = make_split(read_log(movielens_1m(notice=console.print), LogColumns()), recipe.split, seed=recipe.seed)
    contestants: list[Ours | Peer] = [Ours(split.train, replace(recipe, precision=each)) for each in precisions]
    entrants, reason = [Entrant(f"{OURS}, {each}") for each in precisions], "not asked for"
    with ExitStack() as stack:
        for name, precision in product(PATHS, precisions) if peer else ():
            try:
                contestants.append(stack.enter_context(started(split.train, recipe, PATHS[name], precision)))
                entrants.append(Entrant(f"{name}, {precision}"))
            except OSError as error:
                reason = f"RecTools did not start: {error}"
                console.print(reason)
        console.print(UNFAIR.format(length=recipe.data.chunk))
        for round_ in range(rounds):
            for entrant, contestant in zip(entrants, contestants, strict=True):
                entrant.add(*contestant.slice())
            console.print(f"round {round_ + 1}: " + ", ".join(f"{e.name} {e.per_cpu_s[-1]:,.0f}" for e in entrants))
    report(entrants, reason)


@contextmanager
def started(log: ActionLog, recipe: Recipe, path: str, precision: Precision) -> Iterator[Peer]:
    """RecTools, warmed up and waiting. Raises `OSError` where it cannot run."""
    if not PEERS_PYTHON.exists():
        raise OSError("there is no .venv-peers; make bench-train makes one")
    with tempfile.TemporaryDirectory(prefix="streamformer-bench-") as text:
        folder = Path(text)
        csv = folder / "log.csv"
        items = np.unique(log.actions["item"], return_inverse=True)[1]
        table = pa.table({"user": log.user_of_row, "item": items, "rank": np.arange(len(log))})
        pyarrow.csv.write_csv(table, csv)
        spec = {
            "csv": str(csv),
            "d_model": recipe.encoder.d_model,
            "heads": recipe.encoder.heads,
            "layers": len(recipe.encoder.windows),
            "length": recipe.data.chunk,
            "batch": PEER_BATCH,
            "steps": PEER_STEPS,
            "path": path,
            "precision": precision,
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        process = subprocess.Popen(
            [str(PEERS_PYTHON), str(BASELINES / "rectools_train.py"), str(folder / "spec.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            peer = Peer(process)
            while peer.line() != "ready":
                pass
            yield peer
        finally:
            process.kill()
            process.wait()


def report(entrants: list[Entrant], reason: str) -> None:
    """The table and the JSON line."""
    ours = max((each for each in entrants if each.name.startswith(OURS)), key=Entrant.median)
    others = [each for each in entrants if not each.name.startswith(OURS)]
    rows = [
        (each.name, str(Spread(tuple(each.per_cpu_s))), str(Spread(tuple(each.per_wall_s))), _against(ours, each))
        for each in entrants
    ]
    print_table("Targets a second in training", ("", "per CPU second", "on the clock", "ours / this one"), rows)
    fastest = max(others, key=Entrant.median, default=None)
    ratio = None if fastest is None else agreed_ratio(ours.per_cpu_s, fastest.per_cpu_s).median
    print_result(
        {
            "bench": "train",
            "machine": machine(),
            "targets_per_cpu_second": round(ours.median()),
            "precision": ours.name.removeprefix(f"{OURS}, "),
            "rectools_targets_per_cpu_second": {each.name: round(each.median()) for each in others},
            "ratio_rectools": None if ratio is None else round(ratio, 2),
            "reason": reason if ratio is None else None,
        }
    )


def _against(ours: Entrant, other: Entrant) -> str:
    if other is ours:
        return ""
    ratio = agreed_ratio(ours.per_cpu_s, other.per_cpu_s)
    return f"{ratio}, faster in {sum(value > 1 for value in ratio.values)} of {len(ratio.values)} rounds"


if __name__ == "__main__":
    run_command(main)
