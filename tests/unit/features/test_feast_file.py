"""The generated Feast feature view, as far as it can be tested without Feast: see tests/parts."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.commands.features import app
from infra.errors import InfraError
from infra.features.feast import feast_file
from streams.core.features.definitions import FeatureSet, parse_features
from tests.unit.core.features.definitions import TOML


def defined(*names: str, kind: str = 'kind = "top_k"\ngroup = "color"\nk = 2\nwindow = "1d"') -> FeatureSet:
    """Return features with these names."""
    return parse_features("\n".join(f'[[feature]]\nname = "{name}"\n{kind}' for name in names), {"color": None})


def test_every_feature_has_its_fields() -> None:
    """A ranking has a field of names and one of numbers, a list of ids is an array, counts are whole numbers."""
    text = feast_file(parse_features(TOML, {"color": None}))
    types = {
        call.keywords[0].value.value: ast.unparse(call.keywords[1].value)  # type: ignore[attr-defined]
        for call in ast.walk(ast.parse(text))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "Field"
    }
    floats = ("watched", "price", "least", "longest", "since", "length")
    assert types == {
        **dict.fromkeys(("views", "items", "surfaces", "depth"), "Int64"),
        **dict.fromkeys(floats, "Float64"),
        **dict.fromkeys(("last", "last_home", "top", "affinity"), "Array(String)"),
        **dict.fromkeys(("top_numbers", "affinity_numbers"), "Array(Float64)"),
    }


def test_any_name_in_a_filter_is_valid_python() -> None:
    """Quotes, backslashes, line ends and placeholders in the name of an action do not leave its description."""
    names = ['a"b', "$fields {x}", "line\nend", "back\\slash ü"]
    features = parse_features(f"[[feature]]\nname = 'n'\nkind = 'count'\nwindow = '1d'\nactions = {json.dumps(names)}")
    ast.parse(feast_file(features))


@pytest.mark.parametrize("names", [("top", "top_numbers"), ("user_id",), ("event_timestamp",)])
def test_two_fields_of_one_name_are_an_error(names: tuple[str, ...]) -> None:
    """A feature with the name of another's numbers, or of a column that Feast needs, is named with the remedy."""
    with pytest.raises(InfraError, match=f"two fields would be {names[-1]}; rename them"):
        feast_file(defined(*names))


def test_the_file_is_written_or_printed(tmp_path: Path) -> None:
    """With `--out` the file is in that folder, which is created; without, the same text is printed."""
    definitions = tmp_path / "features.toml"
    definitions.write_text("[[feature]]\nname = 'n'\nkind = 'count'\nwindow = '1d'\n")
    printed = CliRunner().invoke(app, ["feast", str(definitions)]).stdout
    result = CliRunner().invoke(app, ["feast", str(definitions), "--out", str(tmp_path / "new" / "folder")])
    file = tmp_path / "new" / "folder" / "user_features.py"
    assert (result.exit_code, result.stdout) == (0, f"{file}\n")
    assert file.read_text() == printed
    definitions.write_text("")
    failed = CliRunner().invoke(app, ["feast", str(definitions), "--out", str(tmp_path / "other")])
    assert failed.exit_code == 2
    assert not (tmp_path / "other").exists()
