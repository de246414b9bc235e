"""The commands of the encoder: training, evaluation and freshness from files, and errors for bad input."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from infra import cli
from tests.unit.encoder.walks import walks_table

SEED = 20_260_604
RECIPE = """
[encoder]
d_model = 32
heads = 4
windows = [8, 8]
sequence_length = 20
embedding_dim = 32
item_dim = 32
item_tower = "identity"
normalize_items = false
[log]
path = "actions.parquet"
[data]
items_min = 1
chunk = 20
batch_tokens = 400
hide_seen = false
[split]
kind = "time"
[budget]
tokens_max = 2_000
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with a log and a recipe for it."""
    pyarrow.parquet.write_table(
        walks_table(SEED, users=20, items=20, length=20, follows=0.9), tmp_path / "actions.parquet"
    )
    (tmp_path / "run.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `streamformer` with the arguments and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["streamformer", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_from_a_log_to_its_figures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`train` leaves a release and no checkpoint; `evaluate` and `freshness` print one JSON line each about it."""
    assert run(monkeypatch, "train", "run.toml", "--threads", "1", "--seed", "3") == 0
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sorted(path.name for path in (folder / "releases" / "run").iterdir()) == [
        "release.json",
        "weights.safetensors",
    ]
    assert run(monkeypatch, "evaluate", "releases/run", "actions.parquet", "--json", "--spans", "2") == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["version"] == trained["version"]
    assert len(evaluated["parts"]) == 2
    assert all(0 <= part["time_blind"]["hr10"] <= 1 and part["time_given"] is None for part in evaluated["parts"])
    assert run(monkeypatch, "freshness", "releases/run", "actions.parquet") == 0
    printed = capsys.readouterr().out
    assert "every action" in printed
    assert json.loads(printed.splitlines()[-1])["bench"] == "freshness"
    assert (folder / "reports" / "freshness.svg").stat().st_size > 10_000


def test_a_folder_of_parquet_is_a_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log in several files gives the same release as in one; above the row limit it is trained on in shards."""
    table = pyarrow.parquet.read_table(folder / "actions.parquet")
    (folder / "actions").mkdir()
    for name, part in (("1", table.slice(0, 150)), ("2", table.slice(150))):
        pyarrow.parquet.write_table(part, folder / "actions" / f"{name}.parquet")
    assert run(monkeypatch, "train", "run.toml", "--threads", "1") == 0
    assert run(monkeypatch, "train", "run.toml", "--threads", "1", "--actions", "actions", "--out", "same") == 0
    one, same = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert one["version"] == same["version"]
    (folder / "small.toml").write_text(RECIPE.replace("[log]", "[log]\nrows_in_memory_max = 250"))
    assert run(monkeypatch, "train", "small.toml", "--threads", "1", "--actions", "actions") == 0
    assert re.search(r"400 actions in [4-9] shards", " ".join(capsys.readouterr().err.split()))
    assert sorted(path.name for path in (folder / "releases" / "small").iterdir()) == [
        "release.json",
        "weights.safetensors",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.toml"], "recipe cannot be read"),
        (["train", "run.toml", "--actions", "absent.csv"], "event log cannot be read"),
        (["evaluate", "absent", "actions.parquet"], "release cannot be read"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    """A missing file gives exit code 1 and one line on standard error that names it."""
    assert run(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
