"""`streamformer features`: compute features from a log."""

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
from infra.signals import interrupt_on_sigterm

app = typer.Typer(name="features", help="Compute features from a log.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Definitions = Annotated[Path, typer.Option(help="Feature definitions, a TOML file.")]
AttributesFile = Annotated[
    Path | None, typer.Option("--attributes", help="Item attributes: .csv, .jsonl or .parquet with item_id.")
]


@app.callback()
def _group() -> None:
    """Turn the application into a group, which Typer does by itself only where it holds several commands."""


@app.command()
def compute(  # noqa: PLR0913 - one parameter per option
    log: Annotated[Path, typer.Argument(help="Actions: .parquet, .csv, .csv.gz, .jsonl or a folder of Parquet files.")],
    definitions: Definitions,
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
    _print_json(summary, out) if json else _print_text(summary, out)


def _require_pyarrow() -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise InfraError(
            "`streamformer features compute` cannot run", "without pyarrow", "run pip install 'streamformer[train]'"
        )


def _print_json(summary: dict[str, Any], out: Path) -> None:
    print(json_module.dumps({"command": "features compute", **summary, "out": str(out)}))


def _print_text(summary: dict[str, Any], out: Path) -> None:
    for note in summary["notes"]:
        print(f"note: {note}", file=sys.stderr)
    seconds = max(summary["seconds"], 1e-3)
    pace = f"{seconds:.1f} s, {summary['rows'] / seconds:,.0f} rows/s"
    print(f"{summary['rows']:,} rows of {summary['users']:,} users from {summary['events']:,} actions in {pace}")
    print(f"{summary['unknown_users']:,} users do not act in the log; their values are empty")
    print(f"{summary['unknown_items']:,} items are not among the item attributes; last_k shows their keys")
    print(f"{summary['repeats']:,} repeated actions were dropped; {summary['estimated_rows']:,} rows have an estimate")
    print(f"feature set {summary['feature_set']}, {summary['features']} features: {out}")
