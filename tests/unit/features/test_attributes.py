"""The attribute file: three formats, one content, one version; every problem at once."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from encoder.actions.columns import item_key
from streams import features_attributes
from streams.core.features.state import AttributesError
from streams.features_attributes import AttributeFileError, read_attributes

ROWS: list[dict[str, Any]] = [
    {"item_id": "i-17", "category": "shoes", "brand": "acme"},
    {"item_id": "i-18", "category": "bags", "brand": None},
    {"item_id": 'say "hü"', "category": "shoes, new", "brand": "ümläut"},
    {"item_id": "i-20", "category": None, "brand": None},
]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format that the suffix names."""
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
        return path
    if ".csv" in path.suffixes:
        quoted = [[f'"{(value or "")}"'.replace('"hü"', '""hü""') for value in row.values()] for row in rows]
        text = "\n".join(",".join(fields) for fields in ([list(rows[0]), *quoted]))
    else:
        text = "\n".join(json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def problems(path: Path, content: str | list[dict[str, Any]]) -> list[str]:
    """Return the problems of a file."""
    if isinstance(content, str):
        path.write_text(content)
    else:
        written(path, content)
    with pytest.raises(AttributeFileError) as caught:
        read_attributes(path)
    return caught.value.problems


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl", "a.ndjson.gz", "a.parquet"])
def test_every_format_gives_the_same_attributes(tmp_path: Path, name: str) -> None:
    """Names, codes, ids and version are those of the rows, whatever the format."""
    found = read_attributes(written(tmp_path / name, ROWS))
    assert found.names == {"brand": ("acme", "ümläut"), "category": ("bags", "shoes", "shoes, new")}
    assert sorted(found.ids) == sorted(row["item_id"] for row in ROWS)
    place = {item: at for at, item in enumerate(found.ids)}
    for row in ROWS:
        at = place[row["item_id"]]
        assert int(found.keys[at]) % 2**64 == item_key(row["item_id"])
        for attribute in ("brand", "category"):
            code = int(found.codes[attribute][at])
            assert (found.names[attribute][code] if code >= 0 else None) == row[attribute]
    assert found.version == "4383bf2e521bd72a"


def test_the_version_follows_the_content_only(tmp_path: Path) -> None:
    """Order of rows and columns does not change the version; a value, an item or an attribute more does."""

    def version(rows: list[dict[str, Any]]) -> str:
        return read_attributes(written(tmp_path / "a.jsonl", rows)).version

    base = version(ROWS)
    assert version(ROWS[::-1]) == base
    assert version([dict(reversed(row.items())) for row in ROWS]) == base
    changed = [
        ROWS[:3],
        [*ROWS, {"item_id": "more"}],
        [{**ROWS[0], "category": "bags"}, *ROWS[1:]],
        [{**ROWS[0], "category": None}, *ROWS[1:]],
        [{**row, "color": None} for row in ROWS],
        [{**ROWS[0], "category": ROWS[0]["brand"], "brand": ROWS[0]["category"]}, *ROWS[1:]],
    ]
    assert len({base, *map(version, changed)}) == len(changed) + 1


def test_ids_alone_are_of_use(tmp_path: Path) -> None:
    """A file with one column gives ids, and numbers are ids as they are in logs."""
    found = read_attributes(written(tmp_path / "a.jsonl", [{"item_id": 17}, {"item_id": "x"}]))
    assert sorted(found.ids) == ["17", "x"]
    assert found.names == {}


def test_an_attribute_may_first_occur_late(tmp_path: Path) -> None:
    """JSON lines may leave out what an item does not have."""
    found = read_attributes(written(tmp_path / "a.jsonl", [{"item_id": "a"}, {"item_id": "b", "color": "red"}]))
    assert [found.codes["color"][found.ids.index(item)] for item in "ab"] == [-1, 0]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "item_id,color\na,red\na,blue", "item_id occurs more than once (row 2: 'a')"),
        ("a.csv", "item_id,color\n,red\nb,blue\n,red", "item_id is missing (2 rows, first row 1)"),
        ("a.csv", "item,color\na,red", "there is no column item_id (header: 'item', 'color')"),
        ("a.csv", "item_id,color,color\na,red,red", "two columns are named 'color'"),
        ("a.csv", "item_id,\na,red", "an attribute has an empty name, or spaces around it (header: '')"),
        ("a.csv", "item_id, color\na,red", "an attribute has an empty name, or spaces around it (header: ' color')"),
        ("a.csv", "item_id,color\na", "the number of fields is not that of the columns (row 1: 1 of 2)"),
        ("a.csv", "item_id,color\na,red,blue", "the number of fields is not that of the columns (row 1: 3 of 2)"),
        ("a.csv", "", "there is no column item_id"),
        ("a.csv", "item_id\n", "there is no item"),
        ("a.csv", "item_id,color\na," + "x" * 257, "color has more than 256 characters (row 1"),
        ("a.csv", "item_id\n" + "x" * 257, "item_id has more than 256 characters (row 1"),
        ("a.csv", "item_id," + "x" * 257 + "\na,b", "the name of an attribute has more than 256 characters"),
        ("a.jsonl", "", "there is no item"),
        (
            "a.jsonl",
            '{"item_id": "a"}\n[1]\nx',
            "not a JSON object (2 rows, first row 2: Expected `object`, got `array`)",
        ),
        ("a.jsonl", '{"item_id": "a"}\n{', "not a JSON object (row 2: Input data was truncated)"),
        ("a.jsonl", "[" * 100_000, "not a JSON object (row 1: "),
        ("a.jsonl", [{"item_id": "a", "price": 3}], "price is not text; write numbers and the like as text (row 1: 3)"),
        ("a.jsonl", [{"item_id": True}], "item_id is not text (row 1: True)"),
        ("a.jsonl", [{"item_id": 1.5}], "item_id is not text (row 1: 1.5)"),
        ("a.jsonl", [{"item_id": "1"}, {"item_id": 1}], "item_id occurs more than once (row 2: '1')"),
        ("a.jsonl", [{"item_id": "a", "tags": ["x"]}], "tags is not text; write numbers and the like as text (row 1"),
        ("a.parquet", [{"item_id": "a", "price": 3.5}], "price is not text; write numbers and the like as text (row 1"),
        ("a.parquet", [{"item": "a"}], "there is no column item_id"),
    ],
)
def test_each_problem_is_named(tmp_path: Path, name: str, content: Any, problem: str) -> None:
    """What is wrong is named with the first row that has it."""
    found = problems(tmp_path / name, content)
    assert any(each.startswith(problem) for each in found), found


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    """Problems of four kinds in many rows are four lines of one error."""
    rows = [
        {"item_id": "a", "n": 1},
        {"item_id": "a"},
        {"item_id": ""},
        *[{"item_id": f"{n}", "n": n} for n in range(9)],
    ]
    found = problems(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\nx")
    assert len(found) == 4
    assert found[0].startswith("n is not text; write numbers and the like as text (10 rows, first row 1: 1)")


def test_the_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More items, attributes or different values than there is room for are problems, and reading ends."""
    monkeypatch.setattr(features_attributes, "ITEMS_MAX", 10)
    monkeypatch.setattr(features_attributes, "VALUES_MAX", 5)
    found = problems(tmp_path / "a.jsonl", [{"item_id": f"{n}", "color": f"{n}"} for n in range(20)])
    assert found == [
        "color has more than 5 different values (5 rows, first row 6)",
        "there are more than 10 items (row 11)",
    ]
    wide = {"item_id": "a", **{f"a{n}": "x" for n in range(features_attributes.ATTRIBUTES_MAX + 3)}}
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert any("more than 50 attributes" in each for each in problems(tmp_path / name, [wide])), name
    many = ",".join(["item_id", *("" for _ in range(40))]) + "\n" + ",".join("x" * 41)
    with pytest.raises(AttributeFileError, match="item attributes are not valid"):
        read_attributes(written_text(tmp_path / "a.csv", many))


def written_text(path: Path, text: str | bytes) -> Path:
    """Write a file."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"item_id\n\xff\xfe"),
        ("a.csv", b'item_id\n"a'),
        ("a.csv", b"item_id\n" + b"x" * 200_000),
        ("a.jsonl", b'{"item_id": "' + b"x" * (2 << 20)),
        ("a.csv.gz", b"no gzip"),
        ("a.csv.gz", gzip.compress(b"item_id\na" * 1_000, mtime=0)[:-9]),
        ("a.parquet", b"no parquet"),
        ("a.txt", b"item_id\na"),
        ("absent.csv", None),
        ("folder.csv", "folder"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: Any) -> None:
    """A file that is missing, damaged, not UTF-8 or of another format ends in one line with its path."""
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(AttributesError, match="item attributes cannot be read") as caught:
        read_attributes(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_needs_pyarrow_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker without pyarrow reads the two text formats, and names what is missing for the third."""
    path = written(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(AttributesError, match=r"needs pyarrow; install it, or write a \.csv"):
        read_attributes(path)


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    """Files of spreadsheets begin with one."""
    path = written_text(tmp_path / "a.csv", "\ufeffitem_id,color\r\na,red\r\n")
    assert read_attributes(path).names == {"color": ("red",)}
