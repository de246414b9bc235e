"""The attribute file: what is known of each item, read from CSV, JSON lines or Parquet, and checked as a whole.

    item_id,category,brand
    i-17,shoes,acme
    i-18,bags,

One row per item, `item_id` plus one column per attribute; values are text, and an empty one means that the item has no
such attribute. The id is part of what is kept, because state holds hashes: `last_k` shows the ids of the items in this
file, and the keys of others. A file with the column `item_id` alone is therefore of use.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

import msgspec
from xxhash import xxh3_64

from streams.core.features.state import Attributes, AttributesError

ITEM = "item_id"
ITEMS_MAX, ATTRIBUTES_MAX, VALUES_MAX = 5_000_000, 50, 100_000
"""Most items, attributes, and different values of one attribute."""
TEXT_MAX = 256
"""Longest id, value or name of an attribute, in characters."""
LINE_BYTES_MAX = 1 << 20
BATCH_ROWS = 65_536
SHOWN_MAX = 20
"""Problems that are listed; one that occurs in many rows is listed once."""
Row = Mapping[str, object]


class AttributeFileError(AttributesError):
    """The attribute file is not valid; `problems` holds one line per kind of problem, with the first row of it."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        self.problems = problems
        more = f"; and {len(problems) - SHOWN_MAX} more" if len(problems) > SHOWN_MAX else ""
        super().__init__(f"item attributes are not valid: {path}: {'; '.join(problems[:SHOWN_MAX])}{more}")


def read_attributes(path: Path) -> Attributes:
    """Read a `.csv`, `.jsonl` or `.parquet` file, the first two also with `.gz`.

    Raises `AttributesError` if the file cannot be read, and `AttributeFileError` with every problem in it. The version
    of the result is a hash of the content: the order of rows and columns does not change it, anything else does.
    """
    table = _Table()
    try:
        for number, row in enumerate(islice(_reader(path)(path, table), ITEMS_MAX + 1), 1):
            if number > ITEMS_MAX:
                table.problem(f"there are more than {ITEMS_MAX:,} items", number)
                break
            table.add(number, row)
    except (OSError, EOFError, zlib.error, ValueError, csv.Error) as error:  # pyarrow's errors are of these classes
        detail = f"{path} ({str(error) or type(error).__name__})"
        raise AttributesError("item attributes cannot be read", detail, "check the path and the format") from error
    if problems := table.problems():
        raise AttributeFileError(path, problems)
    return Attributes.of_columns(list(table.items), table.columns, table.version())


class _Table:
    """The rows that were read, as columns, and the problems in them."""

    def __init__(self) -> None:
        self.items: dict[str, None] = {}
        self.columns: dict[str, list[str | None]] = {}
        self._texts: dict[str, dict[str, str]] = {}
        """Different values of each attribute, so that each is in memory once."""
        self._problems: dict[str, tuple[int, int, str]] = {}
        """Per kind of problem: the number of rows, the first of them, and a detail of it."""

    def problem(self, kind: str, row: int, detail: str = "") -> None:
        """Note a problem in a row."""
        count, first, shown = self._problems.get(kind, (0, row, detail))
        self._problems[kind] = count + 1, first, shown

    def problems(self) -> list[str]:
        """Return one line per kind of problem."""
        if not self.items and not self._problems:
            return ["there is no item"]
        return [
            f"{kind} ({_where(count, first)}{f': {shown}' if shown else ''})"
            for kind, (count, first, shown) in self._problems.items()
        ]

    def names(self, names: list[str]) -> None:
        """Check the names of all columns, which a table has before its rows."""
        if ITEM not in names:
            self.problem(f"there is no column {ITEM}", 0, ", ".join(map(repr, names[:SHOWN_MAX])))
        for name in sorted({name for name in names if names.count(name) > 1}):
            self.problem(f"two columns are named {name!r}", 0)
        for name in names:
            self._column(name, 0)

    def add(self, number: int, row: Row) -> None:
        """Add a row; its item's values are appended to all columns."""
        item = row.get(ITEM)
        if isinstance(item, int) and not isinstance(item, bool):
            item = str(item)  # as logs have it
        if item is None or item == "":
            self.problem(f"{ITEM} is missing", number)
        elif not isinstance(item, str):
            self.problem(f"{ITEM} is not text", number, repr(item))
        elif len(item) > TEXT_MAX:
            self.problem(f"{ITEM} has more than {TEXT_MAX} characters", number, repr(item[:SHOWN_MAX]))
        elif item in self.items:
            self.problem(f"{ITEM} occurs more than once", number, repr(item))
        else:
            self.items[item] = None
        for name in row:
            if name != ITEM:
                self._column(name, number)
        for name, column in self.columns.items():
            column.extend([None] * (len(self.items) - 1 - len(column)))  # the attribute was first seen in this row
            value = self._value(name, row.get(name), number)
            if len(column) < len(self.items):
                column.append(value)

    def version(self) -> str:
        """Return the hash of the content."""
        digest, encode = xxh3_64(), msgspec.json.Encoder().encode
        names = sorted(self.columns)
        digest.update(encode(names))
        rows = zip(self.items, *(self.columns[name] for name in names), strict=True)
        for row in sorted(rows, key=lambda values: values[0]):
            digest.update(encode(row))
        return digest.hexdigest()

    def _column(self, name: str, row: int) -> None:
        """Make room for an attribute of which this is the first value."""
        if name in self.columns or name == ITEM:
            return
        if not name or name != name.strip():
            self.problem("an attribute has an empty name, or spaces around it", row, repr(name))
        if len(name) > TEXT_MAX:
            self.problem(f"the name of an attribute has more than {TEXT_MAX} characters", row, repr(name[:SHOWN_MAX]))
        if len(self.columns) == ATTRIBUTES_MAX:
            self.problem(f"there are more than {ATTRIBUTES_MAX} attributes", row)
        elif len(self.columns) < ATTRIBUTES_MAX:
            self.columns[name], self._texts[name] = [], {}

    def _value(self, name: str, value: object, row: int) -> str | None:
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            self.problem(f"{name} is not text; write numbers and the like as text", row, repr(value)[:TEXT_MAX])
            return None
        if len(value) > TEXT_MAX:
            self.problem(f"{name} has more than {TEXT_MAX} characters", row, repr(value[:SHOWN_MAX]))
            return None
        texts = self._texts[name]
        if len(texts) >= VALUES_MAX and value not in texts:
            self.problem(f"{name} has more than {VALUES_MAX:,} different values", row)
            return None
        return texts.setdefault(value, value)


def _where(count: int, first: int) -> str:
    """Return the rows of a problem as text; row 0 is the line of names."""
    return f"{count:,} rows, first row {first}" if count > 1 else f"row {first}" if first else "header"


Reader = Callable[[Path, _Table], Iterator[Row]]


def _reader(path: Path) -> Reader:
    """Return what reads a file of this name."""
    name = path.name.lower().removesuffix(".gz")
    readers: dict[str, Reader] = {".csv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}
    for suffix, reader in readers.items():
        if name.endswith(suffix):
            return reader
    raise AttributesError("item attributes cannot be read", str(path), f"name a file that ends in {', '.join(readers)}")


def _opened(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines; raise ValueError for one that is too long or not UTF-8."""
    with _opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES_MAX + 1), b""), 1):
            if len(line) > LINE_BYTES_MAX:
                raise ValueError(f"line {number} has more than {LINE_BYTES_MAX} bytes")
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")


def _csv(path: Path, table: _Table) -> Iterator[Row]:
    reader = csv.reader(_lines(path), strict=True)
    names = next(reader, [])
    table.names(names)
    for number, fields in enumerate((fields for fields in reader if fields), 1):
        if len(fields) != len(names):
            table.problem("the number of fields is not that of the columns", number, f"{len(fields)} of {len(names)}")
        yield dict(zip(names, fields, strict=False))


def _json_lines(path: Path, table: _Table) -> Iterator[Row]:
    decoder = msgspec.json.Decoder(dict[str, Any])
    for number, line in enumerate((line for line in _lines(path) if line.strip()), 1):
        try:
            yield decoder.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            table.problem("not a JSON object", number, str(error))


def _parquet(path: Path, table: _Table) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise AttributesError(
            "item attributes cannot be read", f"{path} needs pyarrow", "install it, or write a .csv or .jsonl file"
        ) from error
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        table.names(names)
        if len(set(names)) == len(names) <= ATTRIBUTES_MAX + 1:
            for batch in file.iter_batches(BATCH_ROWS):
                yield from batch.to_pylist()
