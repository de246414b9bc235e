"""Training from a log to a release: it learns, is reproducible, and resumes after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

from encoder.data.log import ActionLog
from encoder.data.split import make_split
from encoder.distributed import ProcessGroup
from encoder.evaluation.next_item import NextItemEvaluator
from encoder.features import UNKNOWN
from encoder.hardware import faster_precision
from encoder.release import load_release
from encoder.training.checkpoint import NAME, CheckpointError
from encoder.training.cooccurrence import cooccurrence_vectors
from encoder.training.recipe import Recipe, RecipeError, parse_recipe
from encoder.training.run import Progress, make_trainer, train_release
from infra.harness.worker_process import free_port
from tests.unit.encoder.walks import small_recipe, walks, walks_table

SEED = 20_260_602


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def losses(log: ActionLog, recipe: Recipe, steps: int) -> list[float]:
    """Return the losses of the first steps of a training."""
    trainer = make_trainer(log, recipe, ProcessGroup())
    batches = trainer.batches()
    return [trainer.train_step(next(batches), 0.0) for _ in range(steps)]


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_one_batch_is_memorized(kind: str) -> None:
    """Fifty steps on a single batch reduce the loss from chance level to almost zero."""
    loss = {"kind": kind, "random_negatives": 20, "batch_negatives_max": 20, "equal_users": False}
    recipe = small_recipe(loss=loss, optimizer={"warmup_steps": 1}, data={"unknown_rate": 0.0})
    trainer = make_trainer(walks(SEED, users=8, length=12), recipe, ProcessGroup())
    rows = next(trainer.batches())
    values = [trainer.train_step(rows, 0.0) for _ in range(50)]
    assert values[0] > 2
    assert values[-1] < 0.05


@pytest.mark.parametrize("objective", ["next_action", "sasrec", "all_action", "dense_all_action"])
def test_the_same_seed_gives_the_same_losses(objective: str) -> None:
    """Two trainings of one recipe are equal to the last bit, including dropout and sampling; another seed differs."""
    log = walks(SEED, users=12, length=20)
    recipe = small_recipe(
        objective={"shares": {objective: 1.0}, "positions_max": 4},
        loss={"kind": "sampled", "random_negatives": 16, "batch_negatives_max": 8},
        optimizer={"dropout": 0.2},
    )
    first = losses(log, recipe, 5)
    assert losses(log, recipe, 5) == first
    assert losses(log, replace(recipe, seed=2), 5) != first


def test_a_walk_is_learned_and_saved(tmp_path: Path) -> None:
    """On a circle followed with probability 0.9, the release predicts the next item, and it is saved as returned."""
    log = walks(SEED)
    reports: list[Progress] = []
    release = train_release(log, small_recipe(), out_dir=tmp_path, threads=1, progress=reports.append)
    assert release.metrics["validation_hr10"] > 0.8
    assert load_release(tmp_path).version == release.version
    assert reports[-1].fraction == 1.0
    assert release.training["negative_pool"] == "the whole catalogue of 30 items"
    assert release.training["later_ms"] == make_split(log, small_recipe().split, seed=1).unseen_from_ms


TRAIN = """
import sys
from pathlib import Path
from encoder.training.run import train_release
from tests.unit.encoder.test_training import SEED, longer
from tests.unit.encoder.walks import walks
recipe = longer(int(sys.argv[2]))
release = train_release(walks(SEED), recipe, out_dir=Path(sys.argv[1]), threads=1, resume=True, checkpoint_every_s=0.2)
print(release.version, release.training["processes"])
"""


def longer(validate_tokens: int) -> Recipe:
    """Return a recipe that trains long enough to be killed."""
    return small_recipe(
        budget={"tokens_max": 12_000, "validate_tokens": validate_tokens, "patience": 100},
        loss={"kind": "sampled", "random_negatives": 16, "batch_negatives_max": 8, "log_q": "sketch"},
        optimizer={"dropout": 0.1},
    )


@pytest.mark.parametrize("validate_tokens", [4_000, 100_000], ids=["the best", "the last"])
def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path, validate_tokens: int) -> None:
    """Killed with SIGKILL and resumed, a training gives the release of an uninterrupted one.

    That release has the weights of the best validation or, without a validation before the end, of the last step.
    """
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_after_a_checkpoint(start(killed, validate_tokens, processes=1), killed)
    recipe = longer(validate_tokens)
    undisturbed = train_release(walks(SEED), recipe, out_dir=whole, threads=1)
    steps: list[Progress] = []
    resumed = train_release(walks(SEED), recipe, out_dir=killed, threads=1, resume=True, progress=steps.append)
    assert resumed.version == undisturbed.version
    assert resumed.metrics == undisturbed.metrics
    assert not (killed / NAME).exists()


def test_two_killed_processes_resume_to_the_same_weights(tmp_path: Path) -> None:
    """Two processes, each with its own sketch, resume likewise; one process cannot resume a checkpoint of two."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_after_a_checkpoint(start(killed, 100_000, processes=2), killed)
    with pytest.raises(CheckpointError, match="by 2 processes, not 1"):
        train_release(walks(SEED), longer(100_000), out_dir=killed, threads=1, resume=True)
    resumed, undisturbed = (
        [process.communicate(timeout=120)[0] for process in start(folder, 100_000, processes=2)]
        for folder in (killed, whole)
    )
    assert resumed == undisturbed
    assert [text.split()[-1] for text in resumed] == ["2", "2"]


def start(folder: Path, validate_tokens: int, *, processes: int) -> list[subprocess.Popen[str]]:
    """Start the processes of one training, with the environment variables of torchrun."""
    place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(folder), str(validate_tokens)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def kill_after_a_checkpoint(processes: list[subprocess.Popen[str]], folder: Path) -> None:
    """Kill a training with SIGKILL as soon as there is a checkpoint."""
    deadline = time.monotonic() + 60
    while not (folder / NAME).exists() and time.monotonic() < deadline and processes[0].poll() is None:
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * len(processes)
    assert (folder / NAME).exists()


@pytest.mark.parametrize("rows_max", [5_000, 800], ids=["in memory", "in shards"])
def test_two_processes_train_one_release(tmp_path: Path, rows_max: int) -> None:
    """Two processes under torchrun train one release, and only the main process prints."""
    table = walks_table(SEED, users=40, items=30, length=40, follows=0.9)
    pyarrow.parquet.write_table(table, tmp_path / "actions.parquet")
    (tmp_path / "run.toml").write_text(
        "[encoder]\nd_model = 32\nheads = 4\nwindows = [8, 8]\nsequence_length = 20\nembedding_dim = 32\n"
        'item_dim = 32\nitem_tower = "identity"\n[data]\nchunk = 20\nbatch_tokens = 400\nhide_seen = false\n'
        f"[budget]\ntokens_max = 4_000\n[log]\nrows_in_memory_max = {rows_max}\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    arguments = ["train", "run.toml", "--actions", "actions.parquet", "--out", "release"]
    done = subprocess.run(
        [*torchrun, "infra.cli", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    [line] = done.stdout.splitlines()
    assert json.loads(line)["processes"] == 2
    assert load_release(tmp_path / "release").training["tokens"] >= 4_000


def test_a_checkpoint_of_another_recipe_is_rejected(tmp_path: Path) -> None:
    """A checkpoint of another recipe is not resumed, and a damaged one is an error."""
    log = walks(SEED, users=8, length=12)

    class Stopped(Exception):
        pass

    def stop(_: Progress) -> None:
        raise Stopped

    recipe = small_recipe(budget={"tokens_max": 2_000})
    with pytest.raises(Stopped):
        train_release(log, recipe, out_dir=tmp_path, threads=1, resume=True, checkpoint_every_s=0.0, progress=stop)
    with pytest.raises(CheckpointError, match="another recipe"):
        train_release(log, replace(recipe, seed=9), out_dir=tmp_path, threads=1, resume=True)
    (tmp_path / NAME).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        train_release(log, recipe, out_dir=tmp_path, threads=1, resume=True)


def test_training_stops_early_and_releases_the_best(tmp_path: Path) -> None:
    """Training ends before its budget when validation stops improving, and releases the best weights."""
    recipe = small_recipe(
        budget={"tokens_max": 400_000, "validate_tokens": 1_500, "patience": 2}, optimizer={"lr": 0.05}
    )
    log = walks(SEED, follows=0.6)
    reports: list[Progress] = []
    release = train_release(log, recipe, out_dir=tmp_path, threads=1, progress=reports.append)
    best = release.metrics["validation_hr10"]
    assert reports[-1].tokens < 200_000
    assert reports[-1].metric is not None
    assert reports[-1].metric < best
    split = make_split(log, recipe.split, seed=recipe.seed)
    evaluator = NextItemEvaluator(split.log, release.vocabularies, split.validation, mask_seen=False)
    assert evaluator.encoder_scores(release.model).hr10 == best


def test_rare_items_are_read_and_never_predicted() -> None:
    """Items below `items_min` share the unknown row and are never targets; the loss stays finite."""
    log = walks(SEED, users=10, length=20, follows=0.3)
    _, counts = np.unique(log.actions["item"], return_counts=True)
    recipe = small_recipe(data={"items_min": int(np.median(counts)) + 1})
    trainer = make_trainer(log, recipe, ProcessGroup())
    assert (trainer.tokens_of_log.item == UNKNOWN).any()
    assert not (trainer.tokens_of_log.item[trainer.positives.rows] == UNKNOWN).any()
    assert np.isfinite(trainer.train_step(next(trainer.batches()), 0.0))


def test_cooccurrence_brings_neighbours_together() -> None:
    """Items that follow each other have more similar vectors than distant ones, and equal seeds give equal vectors."""
    log = walks(SEED, users=200, items=60, length=30, follows=1.0)
    vocabularies = log.vocabularies()
    rows = vocabularies.item_rows(log.actions["item"])
    made = [
        cooccurrence_vectors(rows, log.user_of_row, items=60, dim=16, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert torch.equal(*made)
    unit = torch.nn.functional.normalize(made[0], dim=-1)
    walked = rows[log.starts[0] : log.starts[1]]
    near = (unit[walked[:-1]] * unit[walked[1:]]).sum(-1).mean()
    far = (unit[walked[:5]] * unit[walked[20:25]]).sum(-1).mean()
    assert near > far + 0.2


def test_the_precision_is_one_of_two() -> None:
    """`faster_precision`, the choice of "auto" in a recipe, returns float32 or bfloat16."""
    assert faster_precision() in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encodr": {}}, "unknown key encodr"),
        ({"encoder": {"d_modl": 3}}, "unknown key encoder.d_modl"),
        ({"encoder": {"heads": 3}}, "multiple of twice the heads"),
        ({"loss": {"kind": "hinge"}}, "loss.kind"),
        ({"data": {"chunk": 500, "batch_tokens": 100}}, "at least one chunk"),
        ({"split": {"validation": 0.7, "test": 0.7}}, "leave something to train on"),
    ],
)
def test_a_wrong_recipe_names_what_is_wrong(values: dict[str, object], message: str) -> None:
    """Unknown keys and impossible values are rejected with an error that names them."""
    with pytest.raises(RecipeError, match=message):
        parse_recipe(values)
