"""The oracle in SQL: the value of every kind of feature as of t, as a query over a table of events, run by DuckDB.

It shares nothing with the worker but the parsed definitions. A query reads three tables:

    events   user_id, arrival, item, action, surface, timestamp_ms, duration_ms, value
    items    item, attribute, name
    spine    place, user_id, as_of_ms

and yields `place` and the value. Rankings are returned whole, greatest first; the caller cuts them, because rounding
may order two nearly equal sums either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb
import pyarrow as pa

from streams.core.features.definitions import Feature, FeatureSet, Kind

APPLIED = """
    SELECT e.* FROM log e
    WHERE NOT e.is_deletion AND NOT EXISTS (
        SELECT 1 FROM log d
        WHERE d.is_deletion AND d.user_id = e.user_id AND (d.arrival > e.arrival OR d.timestamp_ms >= e.timestamp_ms)
    )
    QUALIFY e.event_id IS NULL OR row_number() OVER (PARTITION BY e.user_id, e.event_id ORDER BY e.arrival) = 1
"""
"""Events of a log with deletions and repeats that count: nothing before a deletion, nothing that is not newer than one,
and of one event id the first to arrive."""


def connect(events: pa.Table, items: Mapping[str, Mapping[str, str]], spine: pa.Table) -> duckdb.DuckDBPyConnection:
    """Return a database with the three tables."""
    database = duckdb.connect(config={"threads": 2})
    known = [
        {"item": item, "attribute": attribute, "name": name}
        for item, values in items.items()
        for attribute, name in values.items()
    ]
    schema = pa.schema([(name, pa.string()) for name in ("item", "attribute", "name")])
    for name, table in (("events", events), ("items", pa.Table.from_pylist(known, schema)), ("spine", spine)):
        _create(database, name, table)
    return database


def connect_log(log: pa.Table, items: Mapping[str, Mapping[str, str]], spine: pa.Table) -> duckdb.DuckDBPyConnection:
    """Return a database of a log with deletions and event ids; only the events that count are in `events`."""
    database = connect(log, items, spine)
    database.execute("ALTER TABLE events RENAME TO log")
    database.execute(f"CREATE TABLE events AS {APPLIED}")
    return database


def _create(database: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> None:
    database.register("given", table)
    database.execute(f"CREATE TABLE {name} AS SELECT * FROM given")
    database.unregister("given")


def values(database: duckdb.DuckDBPyConnection, features: FeatureSet) -> dict[str, list[Any]]:
    """Return each feature's values in the order of the places."""
    return {each.name: [row[1] for row in database.execute(query(each)).fetchall()] for each in features.features}


def query(feature: Feature) -> str:
    """Return the query of a feature."""
    value, default, more = _value(feature)
    return f"""
        WITH matched AS ({_matched(feature)}) {more},
        found AS ({value})
        SELECT place, coalesce(found.value, {default}) FROM spine LEFT JOIN found USING (place) ORDER BY place
    """


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _matched(feature: Feature) -> str:
    """Return the events before t, inside the window, that pass the filters: one row per place and event."""
    tests = ["e.timestamp_ms < s.as_of_ms"]
    if feature.window_ms:
        begin = f"(s.as_of_ms - {feature.window_ms})"
        hop = (
            300_000
            if feature.window_ms <= 43_200_000
            else 3_600_000
            if feature.window_ms <= 345_600_000
            else 86_400_000
        )
        tests.append(f"e.timestamp_ms >= {begin} - (({begin} % {hop}) + {hop}) % {hop}")
    if feature.filter.actions:
        tests.append(f"e.action IN ({', '.join(map(_text, feature.filter.actions))})")
    if feature.filter.surfaces:
        tests.append(f"e.surface IN ({', '.join(map(_text, feature.filter.surfaces))})")
    tests += [
        f"e.item IN (SELECT item FROM items WHERE attribute = {_text(attribute)} AND name IN "
        f"({', '.join(map(_text, names))}))"
        for attribute, names in feature.filter.where
    ]
    return f"""
        SELECT s.place, s.as_of_ms, e.* EXCLUDE (user_id)
        FROM spine s JOIN events e ON e.user_id = s.user_id AND {" AND ".join(tests)}
    """


def _value(feature: Feature) -> tuple[str, str, str]:
    """Return the query of the value by place, the value without events, and further tables that the query reads."""
    number = {"duration": "nullif(duration_ms, 0)", "value": "value"}.get(feature.of, "")
    newest_first = "ORDER BY timestamp_ms DESC, arrival DESC"
    match feature.kind:
        case Kind.COUNT:
            return _grouped("count(*)"), "0", ""
        case Kind.SUM:
            return _grouped(f"fsum({number}::DOUBLE)"), "0.0", ""
        case Kind.MEAN:
            return _grouped(f"favg({number}::DOUBLE)"), "NULL", ""
        case Kind.MIN:
            return _grouped(f"min({number})::DOUBLE"), "NULL", ""
        case Kind.MAX:
            return _grouped(f"max({number})::DOUBLE"), "NULL", ""
        case Kind.DISTINCT:
            return _grouped(f"count(DISTINCT nullif({feature.of}, ''))"), "0", ""
        case Kind.LAST_K:
            return _grouped(f"list(item {newest_first})[1:{feature.k}]"), "[]", ""
        case Kind.SECONDS_SINCE:
            return _grouped("(any_value(as_of_ms) - max(timestamp_ms)) / 1000.0::DOUBLE"), "NULL", ""
        case Kind.SESSION_DEPTH:
            return _session("count(*)", feature.gap_ms), "0", _sessions(feature.gap_ms)
        case Kind.SESSION_LENGTH:
            length = "(max(timestamp_ms) - min(timestamp_ms)) / 1000.0::DOUBLE"
            return _session(length, feature.gap_ms), "0.0", _sessions(feature.gap_ms)
        case Kind.TOP_K:
            return _ranking("count(*)", feature.group), "[]", ""
        case Kind.DECAYED_AFFINITY:
            return (
                _ranking(f"sum(pow(2.0, -(as_of_ms - timestamp_ms) / {feature.half_life_ms}.0))", feature.group),
                "[]",
                "",
            )


def _grouped(value: str) -> str:
    return f"SELECT place, {value} AS value FROM matched GROUP BY place"


def _ranking(total: str, attribute: str) -> str:
    return f"""
        SELECT place, list([name, total::VARCHAR] ORDER BY total DESC, name) AS value
        FROM (
            SELECT place, items.name, {total} AS total
            FROM matched JOIN items ON items.item = matched.item AND items.attribute = {_text(attribute)}
            GROUP BY place, items.name
        )
        GROUP BY place
    """


def _sessions(gap_ms: int) -> str:
    """Return tables that number the sessions of each place: a session begins after more than the gap."""
    return f""",
        begun AS (
            SELECT *, (timestamp_ms - lag(timestamp_ms) OVER newer > {gap_ms})::INTEGER AS begins
            FROM matched WINDOW newer AS (PARTITION BY place ORDER BY timestamp_ms, arrival)
        ),
        numbered AS (
            SELECT *, sum(coalesce(begins, 1)) OVER (PARTITION BY place ORDER BY timestamp_ms, arrival) AS session
            FROM begun
        )
    """


def _session(value: str, gap_ms: int) -> str:
    return f"""
        SELECT place, {value} AS value FROM numbered
        WHERE session = (SELECT max(session) FROM numbered n WHERE n.place = numbered.place)
        GROUP BY place, as_of_ms HAVING as_of_ms - max(timestamp_ms) <= {gap_ms}
    """
