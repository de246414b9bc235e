"""`streamformer features`: check definitions, and use them without a worker."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.features.explain import Explained, explain, read_all
from streams.core.features.definitions import FeatureSet
from streams.core.features.schema import json_schema

app = typer.Typer(name="features", help="Check feature definitions, and use them.", no_args_is_help=True)

INVALID = 2
"""Exit code for definitions or item attributes that are not valid."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DefinitionsFile = Annotated[Path, typer.Argument(help="Feature definitions, a TOML file.")]
AttributesFile = Annotated[
    Path | None, typer.Option("--attributes", help="Item attributes: .csv, .jsonl or .parquet with item_id.")
]


@app.command()
def check(file: DefinitionsFile, attributes: AttributesFile = None, json: Json = False) -> None:
    """Validate definitions and explain each: window, what is exact, bytes per user; exit code 2 if they are not valid.

    Every problem of both files is one line on standard error.
    """
    feature_set = _read(file, attributes, json)
    explained = explain(feature_set)
    if json:
        print(json_module.dumps({"valid": True, **explained.as_json()}))
    else:
        _print_text(explained)


@app.command()
def schema(file: DefinitionsFile, attributes: AttributesFile = None) -> None:
    """Print the JSON Schema (draft 2020-12) of the values on the topic of features."""
    print(json_module.dumps(json_schema(_read(file, attributes, False)), indent=2, ensure_ascii=False))


def _read(file: Path, attributes: Path | None, json: bool) -> FeatureSet:
    """Return the feature set; print every problem and exit if there is one."""
    feature_set, problems = read_all(file, attributes)
    if feature_set is not None:
        return feature_set
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    if json:
        print(json_module.dumps({"valid": False, "problems": problems}))
    raise typer.Exit(INVALID)


def _print_text(explained: Explained) -> None:
    whole: dict[str, Any] = explained.as_json()
    print(f"feature set {whole['feature_set']}: {len(explained.features)} features, bytes per user:")
    print(f"  {explained.size.typical:,} typically, {explained.size.most:,} at most")
    for each in explained.features:
        print(f"\n{each.name}  {each.kind}")
        for title, text in each.lines():
            print(f"  {title:<8}  {text}")
    print(f"\n{explained.NOTE}")
