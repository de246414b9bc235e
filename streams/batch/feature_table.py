"""Values of features as an Arrow table: a column per feature, typed by its kind, and what holds for the whole row."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from streams.core.features.definitions import FeatureSet, Kind
from streams.core.features.state import FeatureRecords
from streams.core.features.tiles import NEVER_MS

COUNTS = frozenset({Kind.COUNT, Kind.DISTINCT, Kind.SESSION_DEPTH})
RANKINGS = {Kind.TOP_K: pa.int64(), Kind.DECAYED_AFFINITY: pa.float64()}
"""Type of the numbers of each kind of ranking."""
VALID_UNTIL, ESTIMATED = "valid_until_ms", "estimated"
"""Columns of every table: when the first value changes without an event (null if none does), and the names of the
features whose value is an estimate. Values that always age, such as `seconds_since`, do not count."""
SLICE_ROWS = 4_096
"""Rows that are decoded at once."""
_DECODER = msgspec.json.Decoder(dict[str, Any])


def schema(feature_set: FeatureSet) -> pa.Schema:
    """Return the schema of the table."""
    fields = [(each.name, _type(each.kind)) for each in feature_set.features]
    return pa.schema([*fields, (VALID_UNTIL, pa.int64()), (ESTIMATED, pa.list_(pa.string()))])


def table(records: FeatureRecords, feature_set: FeatureSet) -> pa.Table:
    """Return the values of Q queries as a table of `schema`."""
    made = schema(feature_set)
    with _without_collector():
        slices = range(0, len(records.values), SLICE_ROWS)
        return pa.Table.from_batches([_batch(records, low, made) for low in slices], made)


def _batch(records: FeatureRecords, low: int, made: pa.Schema) -> pa.RecordBatch:
    """Return the rows from `low` on as a batch."""
    chosen = slice(low, low + SLICE_ROWS)
    rows = [_DECODER.decode(value) for value in records.values[chosen]]
    arrays = [_array([row[name] for row in rows], made.field(name).type) for name in made.names[:-2]]
    until_ms = records.valid_until_ms[chosen]
    estimated = pa.array(records.estimated[chosen], made.field(ESTIMATED).type)
    return pa.RecordBatch.from_arrays([*arrays, pa.array(until_ms, mask=until_ms >= NEVER_MS), estimated], schema=made)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keep Python from looking for cycles among decoded values, which would take five times as long as decoding."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _type(kind: Kind) -> pa.DataType:
    if kind in COUNTS:
        return pa.int64()
    if kind is Kind.LAST_K:
        return pa.list_(pa.string())
    if kind in RANKINGS:
        return pa.list_(pa.struct([("name", pa.string()), ("value", RANKINGS[kind])]))
    return pa.float64()


def _array(values: list[Any], of_type: pa.DataType) -> pa.Array:
    """Return one column; rankings are lists of [name, number]."""
    if not pa.types.is_list(of_type) or not pa.types.is_struct(of_type.value_type):
        return pa.array(values, of_type)
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    pairs = list(chain.from_iterable(values))
    fields = list(of_type.value_type)
    parts = [pa.array([pair[at] for pair in pairs], each.type) for at, each in enumerate(fields)]
    return pa.ListArray.from_arrays(ends, pa.StructArray.from_arrays(parts, fields=fields), type=of_type)
