"""Features of a log as of the times of a spine: the model's values, in the spine's order, whole or not at all."""

from __future__ import annotations

import errno
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from encoder.actions.columns import item_key
from encoder.data.log import LogColumns, LogError
from infra.cli import app
from infra.features import offline
from infra.features.checks import OfflineError
from infra.features.offline import Job, Summary, check_output, compute_features
from infra.features.ordered import OrderedRows
from infra.features.spine import Spine, read_spine
from infra.harness import feature_model
from streams.core.features.attributes import Attributes
from streams.core.features.definitions import DAY_MS, HOUR_MS, DefinitionsError, FeatureSet, parse_features
from streams.features_attributes import AttributeFileError
from tests.unit.core.features.definitions import TOML
from tests.unit.features.agreement import agrees

SEED = 20_261_203
START_MS = 1_764_547_200_000
COLUMNS = LogColumns(surface="surface", duration_ms="duration_ms", value="value", event_id="event_id")
ITEMS = {f"i{n} 'ü\"": {"color": ["red", "blue", "green"][n % 3]} for n in range(8)}
ATTRIBUTES = Attributes.of(ITEMS, "1")
FEATURES = parse_features(TOML, ATTRIBUTES.names, "1")
WHOLE = [{**table, "k": 99} if "group" in table else table for table in tomllib.loads(TOML)["feature"]]
COUNT = parse_features('[[feature]]\nname = "n"\nkind = "count"\nwindow = "7d"')


def log_rows(users: int = 20, events: int = 30) -> list[dict[str, Any]]:
    """Return actions of users with awkward ids, interleaved, with repeated event ids."""
    rng = np.random.default_rng(SEED)
    return [
        {
            "user_id": f"u{rng.integers(users)} 'ß\"",
            "item_id": f"i{rng.integers(8)} 'ü\"",
            "action": str(rng.choice(["view", "buy"])),
            "timestamp_ms": START_MS + int(rng.integers(160)) * 6 * HOUR_MS,
            "surface": str(rng.choice(["", "home"])),
            "duration_ms": int(rng.integers(3)) * 700,
            "value": None if rng.random() < 0.3 else float(rng.normal()),
            "event_id": f"e{rng.integers(20)}" if rng.random() < 0.5 else None,
        }
        for _ in range(users * events)
    ]


def spine_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a spine in random order: exact event times, random ones, duplicates, unknown users, before everything."""
    rng = np.random.default_rng(SEED + 1)
    spine = [
        {"user_id": row["user_id"], "as_of_ms": row["timestamp_ms"] + int(rng.integers(3) - 1)} for row in rows[::2]
    ]
    spine += [{**row, "as_of_ms": row["as_of_ms"] // HOUR_MS * HOUR_MS + 7 * DAY_MS} for row in spine[::3]]
    spine += [{"user_id": user, "as_of_ms": START_MS + DAY_MS} for user in ("nobody", "", "ü") if user]
    spine += [{**spine[0], "as_of_ms": at} for at in (0, START_MS - 1, START_MS + 400 * DAY_MS)]
    spine += spine[:5]
    return [spine[at] for at in rng.permutation(len(spine))]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as Parquet."""
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def job(folder: Path, features: FeatureSet = FEATURES, **changes: Any) -> Job:
    """Return a job whose files are in the folder."""
    if "spine" not in changes:
        changes["spine"] = read_spine(folder / "spine.parquet")
    made = {"log": folder / "log.parquet", "out": folder / "out.parquet", "columns": COLUMNS, **changes}
    return Job(features, ATTRIBUTES, **made)


def expected(rows: list[dict[str, Any]], user: str, as_of_ms: int) -> dict[str, Any]:
    """Return the model's values over the user's events; of one event id the first in the log counts."""
    events, seen = [], set()
    for arrival, row in enumerate(rows):
        if row["user_id"] == user and (row["event_id"] is None or row["event_id"] not in seen):
            seen.add(row["event_id"])
            events.append(
                feature_model.Event(
                    row["item_id"],
                    row["action"],
                    row["timestamp_ms"],
                    row["surface"],
                    row["duration_ms"],
                    row["value"],
                    arrival,
                )
            )
    return feature_model.values(WHOLE, events, as_of_ms, ITEMS)


def check(rows: list[dict[str, Any]], spine: list[dict[str, Any]], out: Path) -> None:
    """Check that the output has the spine's rows in its order, each with the model's values."""
    found = pa.parquet.read_table(out).to_pylist()
    assert [(row["user_id"], row["as_of_ms"]) for row in found] == [(row["user_id"], row["as_of_ms"]) for row in spine]
    for row in found:
        wanted = expected(rows, row["user_id"], row["as_of_ms"])
        for feature in FEATURES.features:
            value = row[feature.name]
            if feature.group:
                value = [(pair["name"], pair["value"]) for pair in value]
            assert agrees(feature, value, wanted[feature.name]), (row["user_id"], row["as_of_ms"], feature.name)
        assert row["estimated"] == []
        assert row["valid_until_ms"] is None or row["valid_until_ms"] > row["as_of_ms"]


@pytest.mark.parametrize("rows_in_memory_max", [10_000, 160])
@pytest.mark.parametrize("chunk_rows", [65_536, 50, 1])
@pytest.mark.parametrize("run_rows", [500_000, 64])
def test_values_are_those_of_the_model(
    tmp_path: Path, rows_in_memory_max: int, chunk_rows: int, run_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory limits of the log, of a chunk and of the output change nothing."""
    monkeypatch.setattr(offline, "CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(offline, "OrderedRows", lambda folder: OrderedRows(folder, run_rows))
    rows = log_rows()
    spine = spine_rows(rows)
    write(tmp_path / "log.parquet", rows)
    write(tmp_path / "spine.parquet", spine)
    summary = compute_features(job(tmp_path, rows_in_memory_max=rows_in_memory_max))
    check(rows, spine, tmp_path / "out.parquet")
    assert summary.rows == len(spine)
    assert summary.users == len({row["user_id"] for row in spine})
    assert summary.unknown_users == 2
    assert summary.repeats > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "out.parquet", "spine.parquet"]


def test_columns_are_typed(tmp_path: Path) -> None:
    """Counts are whole numbers, measures are doubles, and lists have typed elements, also in an empty output."""
    write(tmp_path / "log.parquet", log_rows())
    compute_features(job(tmp_path, spine=Spine([], np.zeros(0, np.int64), np.zeros(0, np.int64))))
    table = pa.parquet.read_table(tmp_path / "out.parquet")
    assert len(table) == 0
    types = {field.name: str(field.type) for field in table.schema}
    assert list(types)[:2] == ["user_id", "as_of_ms"]
    assert list(types)[-2:] == ["valid_until_ms", "estimated"]
    assert (types["views"], types["depth"], types["items"]) == ("int64",) * 3
    assert (types["watched"], types["price"], types["since"], types["length"]) == ("double",) * 4
    assert types["last"] == "list<element: string>"
    assert types["top"] == "list<element: struct<name: string, value: int64>>"
    assert types["affinity"] == "list<element: struct<name: string, value: double>>"


def small(folder: Path, times_ms: list[int], spine: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Return the rows of a count over a log of one user u."""
    rows = [{"user_id": "u", "item_id": "i", "action": "a", "timestamp_ms": at} for at in times_ms]
    write(folder / "log.parquet", rows)
    write(folder / "spine.parquet", [{"user_id": user, "as_of_ms": at} for user, at in spine])
    compute_features(job(folder, COUNT, columns=LogColumns()))
    found: list[dict[str, Any]] = pa.parquet.read_table(folder / "out.parquet").to_pylist()
    return found


def test_nothing_of_the_time_itself_leaks(tmp_path: Path) -> None:
    """An event at t is not in the value as of t, and is in the value as of t + 1; all as of one time are equal."""
    found = small(tmp_path, [START_MS, START_MS], [("u", START_MS + 1), ("u", START_MS), ("u", 0), ("u", START_MS)])
    assert [row["n"] for row in found] == [2, 0, 0, 0]
    assert [row["valid_until_ms"] for row in found] == [START_MS + 8 * DAY_MS, None, None, None]


def test_a_log_without_any_user_of_the_spine_gives_empty_values(tmp_path: Path) -> None:
    """Users that never act have the values of no events, not missing rows."""
    found = small(tmp_path, [START_MS], [("x", START_MS + 1), ("y", 5)])
    assert [(row["user_id"], row["n"]) for row in found] == [("x", 0), ("y", 0)]


def test_an_empty_log_is_refused(tmp_path: Path) -> None:
    """A log without actions is a mistake, not a source of empty values."""
    write(tmp_path / "spine.parquet", [{"user_id": "u", "as_of_ms": 1}])
    log = pa.table({name: pa.array([], pa.string()) for name in ("user_id", "item_id", "action", "timestamp_ms")})
    pa.parquet.write_table(log, tmp_path / "log.parquet")
    with pytest.raises(LogError, match="empty"):
        compute_features(job(tmp_path, COUNT, columns=LogColumns()))


@pytest.mark.parametrize("at", [-1, 0, START_MS // 1_000, 2**50])
def test_event_times_that_cannot_be_right_are_refused(tmp_path: Path, at: int) -> None:
    """Seconds, negative and far times end the computation; the stream rejects such events."""
    with pytest.raises(LogError, match=f"1 of 2 event times .*{at} ms.*--time-unit s"):
        small(tmp_path, [START_MS, at], [("u", START_MS)])


def test_a_heavy_user_is_computed_in_pieces(tmp_path: Path) -> None:
    """A user with many more actions than a chunk has exact values at any place."""
    count = 300_000
    times = np.sort(np.random.default_rng(SEED).integers(START_MS, START_MS + 30 * DAY_MS, count))
    log = {"user_id": ["u"] * count, "item_id": ["i"] * count, "action": ["a"] * count, "timestamp_ms": times}
    pa.parquet.write_table(pa.table(log), tmp_path / "log.parquet")
    asked = times[[0, 70_000, 150_000, count - 1]]
    spine = Spine(["u"], np.zeros(4, np.int64), asked)
    compute_features(job(tmp_path, COUNT, columns=LogColumns(), spine=spine))
    begin = (asked - 7 * DAY_MS) // DAY_MS * DAY_MS
    wanted = np.searchsorted(times, asked) - np.searchsorted(times, begin)
    assert pa.parquet.read_table(tmp_path / "out.parquet")["n"].to_pylist() == wanted.tolist()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk is full"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["add", "windows"])
def test_a_failure_leaves_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, place: str
) -> None:
    """A full disk or Ctrl-C in the middle leaves what was there before, and no other file."""
    write(tmp_path / "log.parquet", log_rows())
    write(tmp_path / "spine.parquet", spine_rows(log_rows()))
    (tmp_path / "out.parquet").write_text("before")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(OrderedRows, place, fail)
    with pytest.raises(type(error)):
        compute_features(job(tmp_path))
    assert (tmp_path / "out.parquet").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "out.parquet", "spine.parquet"]


def test_what_a_killed_run_left_is_no_obstacle(tmp_path: Path) -> None:
    """Runs and shards of a process that was killed are not mixed into the result, and are removed."""
    rows = log_rows()
    spine = spine_rows(rows)
    write(tmp_path / "log.parquet", rows)
    write(tmp_path / "spine.parquet", spine)
    left = tmp_path / ".out.parquet.part"
    (left / "shards").mkdir(parents=True)
    (left / "run-0.arrow").write_text("half")
    (left / "shards" / "shards.json").write_text("{}")
    compute_features(job(tmp_path, rows_in_memory_max=160))
    check(rows, spine, tmp_path / "out.parquet")
    assert not left.exists()


def test_progress_is_reported_every_two_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of progress name the rows that are done; a computation of less than two seconds has none."""
    rows = log_rows()
    write(tmp_path / "log.parquet", rows)
    write(tmp_path / "spine.parquet", spine_rows(rows))
    lines: list[str] = []
    compute_features(job(tmp_path), lines.append)
    assert lines == []
    monkeypatch.setattr(offline, "PROGRESS_EVERY_S", 0.0)
    monkeypatch.setattr(offline, "CHUNK_ROWS", 100)
    compute_features(job(tmp_path), lines.append)
    assert len(lines) > 3
    assert all(" rows, from " in line for line in lines)


@pytest.mark.parametrize(
    ("lacking", "problem"),
    [
        ("value", "least needs --value, price needs --value;"),
        ("duration_ms", "longest needs --duration-ms, watched needs --duration-ms;"),
        ("surface", "last_home needs --surface, surfaces needs --surface;"),
    ],
)
def test_a_column_that_the_definitions_need_must_be_named(tmp_path: Path, lacking: str, problem: str) -> None:
    """Without the column every value would be that of no events, so it is refused."""
    write(tmp_path / "log.parquet", log_rows())
    columns = LogColumns(**{name: name for name in ("value", "duration_ms", "surface") if name != lacking})
    with pytest.raises(OfflineError, match=problem):
        compute_features(job(tmp_path, columns=columns, spine=Spine([], np.zeros(0, np.int64), np.zeros(0, np.int64))))


def test_features_must_not_have_names_of_other_columns(tmp_path: Path) -> None:
    """A feature named like a column of the output is refused."""
    features = parse_features('[[feature]]\nname = "user_id"\nkind = "seconds_since"')
    spine = Spine(["u"], np.zeros(1, np.int64), np.ones(1, np.int64))
    with pytest.raises(OfflineError, match="names of other columns of the output: user_id"):
        compute_features(job(tmp_path, features, spine=spine))


def test_filters_that_match_nothing_are_noted(tmp_path: Path) -> None:
    """A name that no action of the log has is more often a typing error than an action to come."""
    text = '[[feature]]\nname = "n"\nkind = "seconds_since"\nactions = ["view", "veiw"]\nsurfaces = ["home", "hone"]'
    write(tmp_path / "log.parquet", log_rows())
    spine = Spine(["u"], np.zeros(1, np.int64), np.ones(1, np.int64))
    summary: Summary = compute_features(job(tmp_path, parse_features(text), spine=spine))
    assert summary.notes == ["n: no action veiw in the log", "n: no surface hone in the log"]


def test_items_without_an_id_are_counted(tmp_path: Path) -> None:
    """Items that the attribute file does not list are shown by their keys; the summary has their number."""
    text = '[[feature]]\nname = "last"\nkind = "last_k"\nk = 2'
    rows = log_rows()
    user = rows[0]["user_id"]
    write(tmp_path / "log.parquet", [{**row, "item_id": "new"} if row["user_id"] == user else row for row in rows])
    spine = Spine([user], np.zeros(1, np.int64), np.full(1, START_MS + 99 * DAY_MS))
    summary = compute_features(job(tmp_path, parse_features(text), spine=spine))
    assert summary.unknown_items == 1
    assert pa.parquet.read_table(tmp_path / "out.parquet")["last"].to_pylist() == [[f"{item_key('new'):016x}"] * 2]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("out.csv", "must end in .parquet"),
        ("folder.parquet", "is a folder"),
        ("absent/out.parquet", "folder does not exist"),
        ("log.parquet", "is an input too"),
        ("logs/out.parquet", "is an input too, or is in one"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path: Path, name: str, problem: str) -> None:
    """What would fail at the end, or destroy an input, is refused before the computation."""
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "log.parquet").touch()
    with pytest.raises(OfflineError, match=problem):
        check_output(tmp_path / name, [tmp_path / "log.parquet", tmp_path / "logs"])


def test_the_command_computes_and_prints_json(tmp_path: Path) -> None:
    """`streamformer features compute` reads all files, writes the output and ends with one JSON object."""
    rows = log_rows()
    spine = spine_rows(rows)
    write(tmp_path / "log.parquet", rows)
    write(tmp_path / "spine.parquet", spine)
    write(tmp_path / "items.parquet", [{"item_id": item, **values} for item, values in ITEMS.items()])
    (tmp_path / "features.toml").write_text(TOML)
    options = {
        "--definitions": "features.toml",
        "--at": "spine.parquet",
        "--out": "out.parquet",
        "--attributes": "items.parquet",
    }
    words = [word for option, file in options.items() for word in (option, str(tmp_path / file))]
    for name in ("surface", "duration_ms", "value", "event_id"):
        words += [f"--{name.replace('_', '-')}", name]
    result = CliRunner().invoke(app, ["features", "compute", str(tmp_path / "log.parquet"), *words, "--json"])
    assert result.exit_code == 0, result.output
    check(rows, spine, tmp_path / "out.parquet")
    summary = json.loads(result.stdout)
    assert (summary["command"], summary["rows"], summary["features"]) == ("features compute", len(spine), 14)
    assert summary["attributes"]
    text = CliRunner().invoke(app, ["features", "compute", str(tmp_path / "log.parquet"), *words])
    assert f"{len(spine):,} rows of " in text.stdout


@pytest.mark.parametrize(
    ("definitions", "attributes", "error", "text"),
    [
        ("actions = [1]", None, DefinitionsError, r"feature\[0\]\.actions: must be a list of names"),
        ('where = { size = ["xl"] }', None, DefinitionsError, "'size' needs an item attribute file"),
        (
            'where = { size = ["xl"] }',
            "item_id,color\ni,red",
            DefinitionsError,
            "'size' is not among",
        ),
        ("", "item_id,color\ni,red\ni,red", AttributeFileError, "item_id occurs more than once"),
    ],
)
def test_the_command_refuses_definitions_and_attributes_that_are_wrong(
    tmp_path: Path, definitions: str, attributes: str | None, error: type[Exception], text: str
) -> None:
    """An unknown attribute, a wrong filter and a damaged attribute file end the command before the log is read."""
    (tmp_path / "features.toml").write_text(f'[[feature]]\nname = "n"\nkind = "seconds_since"\n{definitions}')
    words = ["--definitions", str(tmp_path / "features.toml"), "--at", "absent", "--out", str(tmp_path / "out.parquet")]
    if attributes:
        (tmp_path / "items.csv").write_text(attributes)
        words += ["--attributes", str(tmp_path / "items.csv")]
    result = CliRunner().invoke(app, ["features", "compute", "absent.parquet", *words])
    assert isinstance(result.exception, error)
    assert re.search(text, str(result.exception))
    assert not (tmp_path / "out.parquet").exists()
