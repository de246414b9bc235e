"""`streamformer features`: check definitions, use them elsewhere, and compute features from a log."""

from __future__ import annotations

import importlib.util
import json as json_module
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from infra.errors import InfraError
from infra.features.definitions import load_definitions
from infra.features.explain import Explained, explain, read_all
from infra.features.feast import FILE_NAME, feast_file
from infra.signals import interrupt_on_sigterm
from streams.core.features.definitions import FeatureSet
from streams.core.features.schema import json_schema

app = typer.Typer(
    name="features", help="Check feature definitions, and compute features from a log.", no_args_is_help=True
)

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


@app.command()
def feast(
    file: DefinitionsFile,
    attributes: AttributesFile = None,
    out: Annotated[
        Path | None, typer.Option(help=f"Folder of a Feast repository to write {FILE_NAME} to; default: print it.")
    ] = None,
) -> None:
    """Generate a Feast feature view with a push source: entity user, one field per feature."""
    text = feast_file(_read(file, attributes, False))
    if out is None:
        print(text, end="")
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE_NAME).write_text(text, encoding="utf-8")
    print(out / FILE_NAME)


@app.command()
def compute(  # noqa: PLR0913 - one parameter per option
    log: Annotated[Path, typer.Argument(help="Actions: .parquet, .csv, .csv.gz, .jsonl or a folder of Parquet files.")],
    definitions: Annotated[Path, typer.Option(help="Feature definitions, a TOML file.")],
    at: Annotated[Path, typer.Option(help="Parquet file with user_id and as_of_ms: whose values, as of when.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write; it is replaced only when it is complete.")],
    attributes: AttributesFile = None,
    user: Annotated[str, typer.Option(help="Column of user ids.")] = "user_id",
    item: Annotated[str, typer.Option(help="Column of item ids.")] = "item_id",
    action: Annotated[str, typer.Option(help="Column of action types.")] = "action",
    timestamp: Annotated[str, typer.Option(help="Column of event times.")] = "timestamp_ms",
    time_unit: Annotated[Literal["ms", "s"], typer.Option(help="Unit of event times.")] = "ms",
    surface: Annotated[str, typer.Option(help="Column of surfaces, if any.")] = "",
    duration_ms: Annotated[str, typer.Option(help="Column of durations, if any.")] = "",
    value: Annotated[str, typer.Option(help="Column of numbers such as prices or ratings, if any.")] = "",
    event_id: Annotated[str, typer.Option(help="Column of event ids, if any; repeated ones are dropped.")] = "",
    rows_in_memory_max: Annotated[
        int, typer.Option(min=2, help="Actions in memory; a larger Parquet log is divided on disk.")
    ] = 10_000_000,
    json: Json = False,
) -> None:
    """Compute features as of given times, from the events before each: the values that the stream had then.

    The output has the rows of the file --at in its order: user_id, as_of_ms, a column per feature, valid_until_ms
    (when the first value changes without an event) and estimated (names of the features that are estimates).
    """
    interrupt_on_sigterm()
    _require_pyarrow()
    from encoder.data.log import LogColumns
    from infra.features.offline import Job, check_output, compute_features
    from infra.features.spine import read_spine

    check_output(out, [log, definitions, at, *([attributes] if attributes else [])])
    features, known = load_definitions(definitions, attributes)
    columns = LogColumns(user, item, action, timestamp, surface, duration_ms, time_unit, value, event_id)
    job = Job(features, known, log, columns, read_spine(at), out, rows_in_memory_max)
    summary = asdict(compute_features(job, lambda line: print(line, file=sys.stderr)))
    summary |= {"features": len(features.features), "feature_set": features.version, "attributes": known.version}
    _print_json(summary, out) if json else _print_summary(summary, out)


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


def _require_pyarrow() -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise InfraError(
            "`streamformer features compute` cannot run", "without pyarrow", "run pip install 'streamformer[train]'"
        )


def _print_json(summary: dict[str, Any], out: Path) -> None:
    print(json_module.dumps({"command": "features compute", **summary, "out": str(out)}))


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    for note in summary["notes"]:
        print(f"note: {note}", file=sys.stderr)
    seconds = max(summary["seconds"], 1e-3)
    pace = f"{seconds:.1f} s, {summary['rows'] / seconds:,.0f} rows/s"
    print(f"{summary['rows']:,} rows of {summary['users']:,} users from {summary['events']:,} actions in {pace}")
    print(f"{summary['unknown_users']:,} users do not act in the log; their values are empty")
    if summary["unknown_items"]:
        print(f"{summary['unknown_items']:,} items are not among the item attributes; last_k shows their keys")
    print(f"{summary['repeats']:,} repeated actions were dropped; {summary['estimated_rows']:,} rows have an estimate")
    print(f"feature set {summary['feature_set']}, {summary['features']} features: {out}")
