"""`make bench-train`: training speed of the encoder against RecTools, on the same log, machine and model size.

RecTools runs in two variants: `SASRecModel`, and the flat network of its `fast_transformers`, its newest and fastest
path. The log is the training part of MovieLens-1M, leave-one-out. Both libraries have two layers of the same width and
number of heads, the same maximum sequence length, a softmax over the whole catalogue and one thread. If the machine
multiplies faster in bfloat16, everything runs in both precisions, and our faster one is compared with the fastest
RecTools run. The unit is *targets*: the actions that a step predicts, without padding. Rounds are interleaved, a slice
of steps each, after a warm-up; speeds are medians over the rounds, in targets per CPU-second of the process.
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
RECTOOLS_PYTHON = Path(".venv-peers/bin/python")
ROUNDS = 5
STEPS = 6
"""Number of our steps per slice."""
RECTOOLS_STEPS, RECTOOLS_BATCH = 4, 32
"""RecTools' steps per slice, and sequences per batch, chosen so that a step reads about as many positions as ours."""
UNFAIR = """Differences, before any figure:
- that slow RecTools down: it pads every sequence to the maximum length, while ours groups pieces of histories by
  length; Lightning drives SASRecModel. Both predict at most the last {length} actions of a user, ours predicts all.
- that slow ours down: the feed-forward layers of SASRecModel are as wide as the model, ours four times as wide (like
  the flat network's); ours also reads time and action types, and has a head of the same width after its layers."""
PATHS = {"rectools-sasrec": "sasrec", "rectools-flat": "flat"}
Precision = Literal["fp32", "bf16"]


@dataclass(slots=True)
class Measurements:
    """Targets per CPU-second and per second of wall time, for each round."""

    name: str
    per_cpu_s: list[float] = field(default_factory=list)
    per_wall_s: list[float] = field(default_factory=list)

    def add(self, targets: int, cpu_s: float, wall_s: float) -> None:
        """Add the figures of one slice."""
        self.per_cpu_s.append(targets / cpu_s)
        self.per_wall_s.append(targets / wall_s)

    def median(self) -> float:
        """Return the median of targets per CPU-second."""
        return Spread(tuple(self.per_cpu_s)).median


class Ours:
    """The trainer of the streaming encoder, run in slices of steps."""

    def __init__(self, log: ActionLog, recipe: Recipe) -> None:
        self._trainer = make_trainer(log, recipe, ProcessGroup())
        self._batches = self._trainer.batches()
        for _ in range(2):
            self._trainer.train_step(next(self._batches), 0.0)

    def slice(self) -> tuple[int, float, float]:
        """Train one slice; return its targets, CPU seconds and wall seconds."""
        wall_s, cpu_s, before = time.perf_counter(), time.process_time(), self._trainer.targets
        for _ in range(STEPS):
            self._trainer.train_step(next(self._batches), 0.0)
        return self._trainer.targets - before, time.process_time() - cpu_s, time.perf_counter() - wall_s


class RecTools:
    """RecTools in a process of its own, which trains one slice per line on its standard input."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def line(self) -> str:
        """Return the next line of the process; raises `OSError` with its last line of errors if it has ended."""
        assert self._process.stdout is not None
        if text := self._process.stdout.readline():
            return text.strip()
        assert self._process.stderr is not None
        raise OSError((self._process.stderr.read().strip().splitlines() or ["no error output"])[-1])

    def slice(self) -> tuple[int, float, float]:
        """Train one slice; return its targets, CPU seconds and wall seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        measured = json.loads(self.line())
        return measured["targets"], measured["cpu_s"], measured["wall_s"]


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds, one slice of each library per round.")] = ROUNDS,
    peer: Annotated[bool, typer.Option("--peer/--no-peer", help="Measure RecTools too.")] = True,
) -> None:
    """Measure the training speed of ours and of RecTools, in targets per CPU-second."""
    torch.set_num_threads(1)
    recipe = read_recipe(RUNS / "ml1m_streaming.toml")
    precisions: list[Precision] = ["fp32", "bf16"] if faster_precision() is torch.bfloat16 else ["fp32"]
    split = make_split(read_log(movielens_1m(notice=console.print), LogColumns()), recipe.split, seed=recipe.seed)
    trainers: list[Ours | RecTools] = [Ours(split.train, replace(recipe, precision=each)) for each in precisions]
    measurements, reason = [Measurements(f"{OURS}, {each}") for each in precisions], "not requested"
    with ExitStack() as stack:
        for name, precision in product(PATHS, precisions) if peer else ():
            try:
                trainers.append(stack.enter_context(started(split.train, recipe, PATHS[name], precision)))
                measurements.append(Measurements(f"{name}, {precision}"))
            except OSError as error:
                reason = f"RecTools did not start: {error}"
                console.print(reason)
        console.print(UNFAIR.format(length=recipe.data.chunk))
        for round_ in range(rounds):
            for measured, trainer in zip(measurements, trainers, strict=True):
                measured.add(*trainer.slice())
            console.print(f"round {round_ + 1}: " + ", ".join(f"{e.name} {e.per_cpu_s[-1]:,.0f}" for e in measurements))
    report(measurements, reason)


@contextmanager
def started(log: ActionLog, recipe: Recipe, path: str, precision: Precision) -> Iterator[RecTools]:
    """Start RecTools and wait until it is warmed up. Raises `OSError` if it cannot run."""
    if not RECTOOLS_PYTHON.exists():
        raise OSError(".venv-peers does not exist; make bench-train creates it")
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
            "batch": RECTOOLS_BATCH,
            "steps": RECTOOLS_STEPS,
            "path": path,
            "precision": precision,
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        process = subprocess.Popen(
            [str(RECTOOLS_PYTHON), str(BASELINES / "rectools_train.py"), str(folder / "spec.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            rectools = RecTools(process)
            while rectools.line() != "ready":
                pass
            yield rectools
        finally:
            process.kill()
            process.wait()


def report(measurements: list[Measurements], reason: str) -> None:
    """Print the table and the JSON line."""
    ours = max((each for each in measurements if each.name.startswith(OURS)), key=Measurements.median)
    others = [each for each in measurements if not each.name.startswith(OURS)]
    rows = [
        (each.name, str(Spread(tuple(each.per_cpu_s))), str(Spread(tuple(each.per_wall_s))), _against(ours, each))
        for each in measurements
    ]
    print_table("Training speed in targets per second", ("", "per CPU-second", "wall time", "ours / this one"), rows)
    fastest = max(others, key=Measurements.median, default=None)
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


def _against(ours: Measurements, other: Measurements) -> str:
    if other is ours:
        return ""
    ratio = agreed_ratio(ours.per_cpu_s, other.per_cpu_s)
    return f"{ratio}, faster in {sum(value > 1 for value in ratio.values)} of {len(ratio.values)} rounds"


if __name__ == "__main__":
    run_command(main)
