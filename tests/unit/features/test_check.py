"""`streamformer features check` and `schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
from typer.testing import CliRunner

from infra.commands.features import app
from streams.core.features.definitions import parse_features
from tests.unit.core.features.definitions import TOML

ATTRIBUTES = "item_id,color\ni-1,red\ni-2,blue\n"


class Result(NamedTuple):
    """Outcome of one call of a command."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a file of definitions and one of item attributes, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "features.toml").write_text(TOML)
    (tmp_path / "items.csv").write_text(ATTRIBUTES)
    return tmp_path


def run(*arguments: str) -> Result:
    """Call a command of the group."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return Result(result.exit_code, result.stdout, result.stderr)


def check(*arguments: str) -> Result:
    """Call `check` on the files of the folder."""
    return run("check", "features.toml", "--attributes", "items.csv", *arguments)


@pytest.mark.usefixtures("folder")
def test_each_feature_is_explained() -> None:
    """The text names, per feature, what it is, where its window begins, what is exact, its cap and its bytes."""
    result = check()
    assert (result.returncode, result.stderr) == (0, "")
    head, *sections = result.stdout.split("\n\n")
    assert "14 features" in head
    assert sections[2].splitlines() == [
        "items  distinct",
        "  is        Number of different items of events in the last 7d, from a boundary of 1d in UTC.",
        "  window    as of t it begins at t - 7d, rounded down to a boundary of 1d in UTC: at least 7d, less than 8d; "
        "8 tiles of 1d",
        "  exact     Exact while at most 64 different items are in the window; beyond that a theta sketch with a "
        "relative standard error of about 12.5 %, larger while most of a user's ids leave the window "
        "(1/√(ids known in the window)), and named in the header `estimated`.",
        "  cap       64 per user",
        "  bytes     90 typically, 306 at most",
    ]
    assert sections[4].splitlines()[0] == "last_home  last_k"
    assert not any("window" in line or "cap" in line for line in sections[4].splitlines())


@pytest.mark.usefixtures("folder")
def test_the_explanation_as_json() -> None:
    """`--json` has the same as fields, with the version that records carry."""
    found: dict[str, Any] = json.loads(check("--json").stdout)
    assert found["valid"]
    assert len(found["feature_set"]) == 16
    assert found["bytes"]["typical"] < found["bytes"]["most"]
    by_name = {each["name"]: each for each in found["features"]}
    assert [by_name["items"][key] for key in ("hop_ms", "window_ms", "tiles", "standard_error", "cap")] == [
        *(86_400_000, 604_800_000, 8, 0.125, 64)
    ]
    assert (by_name["views"]["cap"], by_name["views"]["standard_error"]) == (None, None)
    assert by_name["last"]["begins"] == ""


@pytest.mark.usefixtures("folder")
def test_the_version_is_that_of_the_definitions_and_attributes() -> None:
    """Another attribute file is another version, as for a worker."""
    before = json.loads(check("--json").stdout)["feature_set"]
    Path("items.csv").write_text(ATTRIBUTES + "i-3,green\n")
    assert json.loads(check("--json").stdout)["feature_set"] != before


@pytest.mark.parametrize(
    ("definitions", "attributes", "lines"),
    [
        (TOML, None, ["feature[2].where.color: 'color' needs", "feature[12].group", "feature[13].group"]),
        (
            TOML.replace('"1h"', '"1y"'),
            ATTRIBUTES,
            ["features.toml: feature[0].window: must be a number with", "features.toml: feature[6].window"],
        ),
        ("[[feature]\n", ATTRIBUTES, ["features.toml: not TOML"]),
        (TOML.replace('"1h"', '"1y"', 1), "item_id,color\n,red\n", ["items.csv: ", "features.toml: feature[0].window"]),
        (TOML, "item_id,color\n,red\n", ["items.csv: "]),
        (TOML, "", ["items.csv"]),
        (None, ATTRIBUTES, ["features.toml: cannot be read"]),
    ],
)
def test_every_problem_is_one_line(
    definitions: str | None, attributes: str | None, lines: list[str], folder: Path
) -> None:
    """All problems of both files are printed at once, one line each, and nothing is explained: exit code 2."""
    if definitions is None:
        (folder / "features.toml").unlink()
    else:
        (folder / "features.toml").write_text(definitions)
    (folder / "items.csv").write_text(attributes or "")
    options = [] if attributes is None else ["--attributes", "items.csv"]
    result = run("check", "features.toml", *options)
    assert (result.returncode, result.stdout) == (2, "")
    printed = result.stderr.splitlines()
    assert len(printed) == len(lines)
    for line, part in zip(printed, lines, strict=True):
        assert line.startswith("error: ")
        assert part in line
    found = json.loads(run("check", "features.toml", *options, "--json").stdout)
    assert found == {"valid": False, "problems": [line.removeprefix("error: ") for line in printed]}


@pytest.mark.usefixtures("folder")
def test_the_schema_is_printed() -> None:
    """`schema` prints a valid JSON Schema that names the feature set."""
    found = json.loads(run("schema", "features.toml", "--attributes", "items.csv").stdout)
    jsonschema.Draft202012Validator.check_schema(found)
    assert found["$id"].endswith(json.loads(check("--json").stdout)["feature_set"])
    assert set(found["properties"]) == {each.name for each in parse_features(TOML, {"color": None}).features}
    assert run("schema", "missing.toml").returncode == 2
