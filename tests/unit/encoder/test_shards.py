"""Logs larger than the memory limit: cut into shards of whole users, and trained on like one log."""

from __future__ import annotations

import gc
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from encoder.data.batches import epoch_batches
from encoder.data.log import ActionLog, LogColumns, LogError, read_log
from encoder.data.shards import MANIFEST, Shards, open_log
from encoder.data.split import SplitConfig, make_split, split_shards
from encoder.distributed import ProcessGroup
from encoder.features import Tokens
from encoder.training.checkpoint import NAME
from encoder.training.run import Progress, make_trainer, train_release
from tests.unit.encoder.walks import MINUTE_MS, START_MS, small_recipe, walks

SEED = 20_260_606
ROWS, BUDGET = 4_000, 1_000
COLUMNS = LogColumns(surface="surface", duration_ms="number")
"""Every action has a unique number, stored as its duration, so that tests can find it again."""
RECIPE = small_recipe(
    split={"kind": "leave_one_out"},
    data={"items_min": 3, "positives": ["view", "buy"]},
    loss={"kind": "sampled", "random_negatives": 16, "batch_negatives_max": 8, "log_q": "exact"},
    items={"initial": "cooccurrence"},
    optimizer={"dropout": 0.1},
    budget={"tokens_max": 10_000, "validate_tokens": 3_000, "patience": 100},
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def uneven_table() -> pa.Table:
    """Return few users with many actions and many with few, in random order, with equal times and rare items."""
    rng = np.random.default_rng(SEED)
    user = (250 * rng.random(ROWS) ** 1.5).astype(int)
    item = (60 * rng.random(ROWS) ** 3).astype(int)
    names = np.array(["view", "click", "buy"])
    return pa.table(
        {
            "user_id": [f"u{value}" for value in user],
            "item_id": [f"i{value}" for value in item],
            "action": names[np.arange(ROWS) // 2 % 3].tolist(),
            "timestamp_ms": START_MS + rng.integers(0, 500, ROWS) * MINUTE_MS,
            "surface": ["" if value % 7 == 0 else f"s{value % 3}" for value in item],
            "number": np.arange(ROWS),
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the log as a folder of files of different sizes."""
    table = uneven_table()
    (tmp_path / "log" / "later").mkdir(parents=True)
    for name, first, last in (("a", 0, 700), ("b", 700, 3_100), ("later/c", 3_100, ROWS)):
        pyarrow.parquet.write_table(
            table.slice(first, last - first), tmp_path / "log" / f"{name}.parquet", row_group_size=333
        )
    return tmp_path / "log"


def in_shards(folder: Path, progress: Callable[[str], None] = lambda _: None) -> Shards:
    """Open a log that exceeds the memory limit."""
    log = open_log(folder, COLUMNS, rows_max=BUDGET, folder=folder.parent / "shards", progress=progress)
    assert isinstance(log, Shards)
    return log


def numbers(log: ActionLog) -> list[int]:
    """Return the numbers of the actions of a log, in order."""
    found: list[int] = log.actions["duration_ms"].tolist()
    return found


def by_user(log: ActionLog) -> dict[str, list[int]]:
    """Return the numbers of each user's actions, in order."""
    bounds = itertools.pairwise(log.starts.tolist())
    return {user: numbers(log)[first:last] for user, (first, last) in zip(log.users.tolist(), bounds, strict=True)}


def test_a_shard_holds_whole_users_in_order(folder: Path) -> None:
    """Each user is in one shard, with all actions in the order of the log in memory, ties in file order."""
    shards, whole = in_shards(folder), read_log(folder, COLUMNS)
    parts = [shards.read(number) for number in range(len(shards))]
    assert len(shards) >= 8
    assert shards.rows == sum(map(len, parts)) == len(whole) == ROWS
    assert max(map(len, parts)) <= BUDGET // 2
    found = [by_user(part) for part in parts]
    assert sum(map(len, found)) == len(whole.users)
    assert {user: rows for part in found for user, rows in part.items()} == by_user(whole)
    assert shards.end_ms == whole.actions["timestamp_ms"].max() + 1


@pytest.mark.parametrize("items_min", [1, 5])
def test_vocabularies_are_those_of_the_log_in_memory(folder: Path, items_min: int) -> None:
    """Items and the names of actions and surfaces, by frequency and first appearance, are the same from shards."""
    config = SplitConfig("leave_one_out", items_min=40)
    split, whole = (
        make(log, config, seed=1)
        for make, log in ((split_shards, in_shards(folder)), (make_split, read_log(folder, COLUMNS)))
    )
    ours, theirs = (each.train.vocabularies(items_min=items_min) for each in (split, whole))
    assert np.array_equal(ours.item_keys, theirs.item_keys)
    assert (ours.actions, ours.surfaces) == (theirs.actions, theirs.surfaces)
    assert len(ours.item_keys) > 5
    assert len(ours.surfaces) == 3
    counts = [each.train.item_counts(("buy",)) for each in (split, whole)]
    assert np.array_equal(counts[0].keys, counts[1].keys)
    assert np.array_equal(counts[0].counts, counts[1].counts)


@pytest.mark.parametrize("kind", ["last", "leave_one_out", "time"])
def test_no_answer_of_any_shard_is_trained_on(folder: Path, kind: str) -> None:
    """No validation target, nor a leave-one-out test target, is trained on in any shard; little else is missing."""
    shards, whole = in_shards(folder), read_log(folder, COLUMNS)
    config = SplitConfig(kind, validation=0.3)  # type: ignore[arg-type]
    split = split_shards(shards, config, seed=1)
    trained = [split.train.part(number) for number in range(split.train.parts)]
    rows = set(itertools.chain.from_iterable(map(numbers, trained)))
    assert len(rows) == sum(map(len, trained))
    targets = split.log.actions[split.validation.target]
    assert len(targets) >= 3
    assert not rows & set(targets["duration_ms"].tolist())
    first = by_user(shards.read(0))
    for newest, target in zip(split.validation.newest, split.validation.target, strict=True):
        user = str(split.log.users[split.log.user_of_row[target]])
        at = first[user].index(int(split.log.actions["duration_ms"][target]))
        assert first[user][at - 1] == split.log.actions["duration_ms"][newest]
    if kind == "time":
        assert max(part.actions["timestamp_ms"].max() for part in trained) < targets["timestamp_ms"].min()
        assert split.unseen_from_ms > targets["timestamp_ms"].max()
    else:
        assert split.unseen_from_ms == shards.end_ms
    if kind == "leave_one_out":
        assert rows == set(numbers(make_split(whole, config, seed=1).train))
    if kind == "last":
        assert len(rows) == ROWS - len(targets)


def test_held_users_are_trained_on_in_no_shard(folder: Path) -> None:
    """With `held_users`, a share of every shard's users is not trained on, and validation uses those of the first."""
    split = split_shards(in_shards(folder), SplitConfig("leave_one_out", held_users=0.3), seed=1)
    kept = [np.diff(split.train.part(number).starts) > 0 for number in range(split.train.parts)]
    assert 0.5 < np.concatenate(kept).mean() < 0.9
    assert not set(split.log.users[np.unique(split.log.user_of_row)]) & set(split.train.part(0).users[kept[0]])


def test_an_epoch_reads_every_action_of_every_shard_once(folder: Path) -> None:
    """The batches of an epoch contain each training action once; the next epoch reads the shards in another order."""
    shards = in_shards(folder)
    split = split_shards(shards, RECIPE.split, seed=RECIPE.seed)
    trainer = make_trainer(split.train, RECIPE, ProcessGroup())
    read: list[list[int]] = [[], []]
    orders: list[list[int]] = [[], []]
    for rows in trainer.batches():
        if trainer.epoch == 2:
            break
        read[trainer.epoch] += trainer.tokens_of_log.duration_ms[rows[rows >= 0]].tolist()
        if trainer.step_of_part == 1:
            orders[trainer.epoch].append(int(trainer.tokens_of_log.duration_ms[0]))
    wanted = sorted(numbers(make_split(read_log(folder, COLUMNS), RECIPE.split, seed=RECIPE.seed).train))
    assert sorted(read[0]) == sorted(read[1]) == wanted
    assert len(orders[0]) == len(shards)
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_actions_in_memory_stay_within_the_budget(folder: Path) -> None:
    """From opening the log to the end of the training, the actions in memory never exceed the limit."""
    with watched_rows() as held:
        shards = in_shards(folder)
        train_release(shards, RECIPE, out_dir=folder.parent / "release", threads=1)
    assert len(held) > 100
    assert BUDGET // 2 < max(held) <= BUDGET


@contextmanager
def watched_rows() -> Iterator[list[int]]:
    """Record the number of distinct actions in all live logs and tokens, whenever one was read, cut or trained on."""
    held: list[int] = []
    places = {"log_from_table", "select", "_split", "tokens", "train_step", "part"}

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event == "return" and frame.f_code.co_name in places:
            alive = gc.get_objects()
            logs = [each.actions["duration_ms"] for each in alive if type(each) is ActionLog]
            tokens = [each.duration_ms for each in alive if type(each) is Tokens]
            held.append(len(np.unique(np.concatenate([np.zeros(0, np.int64), *logs, *tokens]))))

    gc.collect()
    gc.freeze()
    sys.setprofile(watch)
    try:
        yield held
    finally:
        sys.setprofile(None)
        gc.unfreeze()


KILLED = """
import sys
from pathlib import Path
from encoder.training.run import train_release
from tests.unit.encoder.test_shards import RECIPE, in_shards
folder = Path(sys.argv[1])
train_release(in_shards(folder), RECIPE, out_dir=folder.parent / "killed", threads=1, resume=True, checkpoint_every_s=0)
"""


def test_a_killed_training_on_shards_goes_on_to_the_same_weights(folder: Path) -> None:
    """Killed with SIGKILL in a later shard and resumed, a training gives the release of an uninterrupted one."""
    checkpoint = folder.parent / "killed" / NAME
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    read = [0, 0]
    while (read[0] < 2 or read[1] < 2) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
        if checkpoint.exists():
            read = torch.load(checkpoint, weights_only=True)["trainer"]["read"]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = (folder.parent / "shards" / MANIFEST).stat().st_mtime_ns
    steps: list[Progress] = []
    resumed = train_release(
        in_shards(folder), RECIPE, out_dir=folder.parent / "killed", threads=1, resume=True, progress=steps.append
    )
    assert (folder.parent / "shards" / MANIFEST).stat().st_mtime_ns == left
    in_shards(folder).remove()
    undisturbed = train_release(in_shards(folder), RECIPE, out_dir=folder.parent / "whole", threads=1)
    assert resumed.version == undisturbed.version
    assert resumed.metrics == undisturbed.metrics
    assert undisturbed.metrics["validation_hr10"] > 0


def test_shards_that_are_incomplete_or_of_another_log_are_replaced(folder: Path) -> None:
    """Shards without a manifest, or of a log that has changed since, are replaced; others are used again."""
    lines: list[str] = []
    first = in_shards(folder)
    (first.folder / MANIFEST).unlink()
    (first.folder / "000.parquet").write_bytes(b"cut off")
    again = in_shards(folder, lines.append)
    assert (again.digest, again.shards) == (first.digest, first.shards)
    assert sum(len(again.read(number)) for number in range(len(again))) == ROWS
    assert lines[0] == f"reading shard 1 of {len(again)}"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(folder / "a.parquet").slice(100), folder / "a.parquet")
    changed = in_shards(folder)
    assert changed.rows == ROWS - 100
    assert changed.digest != first.digest


def test_a_log_within_the_budget_is_read_into_memory(folder: Path) -> None:
    """A log with exactly the allowed number of actions is read into memory, and no shards are written."""
    log = open_log(folder, COLUMNS, rows_max=ROWS, folder=folder.parent / "shards")
    assert isinstance(log, ActionLog)
    pyarrow.parquet.write_table(
        pa.concat_tables(map(pyarrow.parquet.read_table, files(folder))), folder.parent / "one.parquet"
    )
    one = read_log(folder.parent / "one.parquet", COLUMNS)
    assert np.array_equal(log.actions, one.actions)
    assert np.array_equal(log.users, one.users)
    assert not (folder.parent / "shards").exists()


def files(folder: Path) -> list[Path]:
    """Return the files of the log, in order."""
    return [folder / name for name in ("a.parquet", "b.parquet", "later/c.parquet")]


def test_one_part_gives_the_batches_of_a_log() -> None:
    """The order of batches of a log in memory depends only on seed and epoch."""
    log, recipe = walks(SEED), small_recipe()
    batches = make_trainer(log, recipe, ProcessGroup()).batches()
    for epoch in range(3):
        for rows in epoch_batches(log.starts, recipe.data, np.random.default_rng([recipe.seed, epoch])):
            assert np.array_equal(next(batches), rows)


def test_a_user_who_does_not_fit_into_a_shard_is_an_error(tmp_path: Path) -> None:
    """A user with more actions than a shard can hold is an error that names the setting; a missing id is one too."""
    table = uneven_table().set_column(0, "user_id", pa.array(["u1"] * ROWS))
    pyarrow.parquet.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(LogError, match="rows_in_memory_max to 8,000 or more"):
        open_log(tmp_path / "log.parquet", COLUMNS, rows_max=BUDGET, folder=tmp_path / "shards")
    missing = uneven_table().set_column(0, "user_id", pa.array([None, *["u1"] * (ROWS - 1)]))
    pyarrow.parquet.write_table(missing, tmp_path / "log.parquet")
    with pytest.raises(LogError, match="user_id has 1 missing values"):
        open_log(tmp_path / "log.parquet", COLUMNS, rows_max=BUDGET, folder=tmp_path / "shards")
    with pytest.raises(LogError, match=re.escape("check the path and the column names")):
        open_log(tmp_path / "log.parquet", replace(COLUMNS, item="itm"), rows_max=BUDGET, folder=tmp_path / "shards")
