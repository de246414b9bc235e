"""Changes as text."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from streams.subscriber import Tombstone, UserFeatures
from streams.subscriber.lines import AnyChange, as_json, lines_of
from tests.unit.subscriber.test_embeddings import embedding
from tests.unit.subscriber.test_features import features

NOON_MS = 1_700_049_600_000
"""2023-11-15 12:00:00 UTC."""


def plain(change: AnyChange) -> list[str]:
    """Return the lines for people, without colours."""
    return [line.plain for line in lines_of(change)]


def of_values(values: dict[str, Any], **metadata: Any) -> UserFeatures:
    """Return ann's features at noon."""
    times = {"as_of_ms": NOON_MS, "computed_at_ms": NOON_MS + 7, "completeness": {}, "estimated": ()}
    return UserFeatures("ann", values, replace(features("ann", 5).metadata, **(times | metadata)))


def test_a_line_of_json_holds_everything() -> None:
    """The JSON holds every field, and numbers as short as float32 allows."""
    assert json.loads(as_json(embedding("ann", 5))) == {
        "user": "ann",
        "encoder_version": "v1",
        "event_time_ms": 5,
        "sequence_length": 3,
        "reason": "every_n",
        "source_offset": 5,
        "encoded_at_ms": 9,
        "vector": [0.1, -2.0],
    }
    assert json.loads(as_json(features("ann", 5, 7))) == {
        "user": "ann",
        "feature_set": "set1",
        "as_of_ms": 7,
        "valid_until_ms": 99,
        "completeness": {"n": 0.5},
        "estimated": ["n"],
        "event_time_ms": 5,
        "reason": "every_n",
        "source_offset": 5,
        "computed_at_ms": 9,
        "values": {"n": 1, "top": [["red", 2]], "none": None},
    }
    assert json.loads(as_json(Tombstone("ann", 7))) == {"user": "ann", "tombstone": True, "source_offset": 7}


def test_features_are_a_table() -> None:
    """A line with the metadata, then one per feature, aligned; what is not the whole truth is noted beside it."""
    values = {"n": 12, "price": 3.14159265, "never": None, "last": ["a", "b"], "top": [["red", 2], ["blue", 0.5]]}
    change = of_values(values, completeness={"n": 0.625, "top": 0}, estimated=("top",), valid_until_ms=NOON_MS + 60_000)
    assert plain(change) == [
        "12:00:00.007  ann  every_n  offset 5  set set1  valid until 12:01:00.000",
        "  n      12  (has seen 62% of its window)",
        "  price  3.14159",
        "  never  none",
        "  last   [a, b]",
        "  top    [red 2, blue 0.5]  (estimate, has seen 0% of its window)",
    ]


def test_the_end_of_validity_has_its_date() -> None:
    """A value that changes on another day has the date; one that never does has no end; any number is shown."""
    ends = {until: plain(of_values({}, valid_until_ms=until))[0] for until in (NOON_MS + 86_400_000, None, 2**61)}
    assert [line.partition("set set1")[2] for line in ends.values()] == [
        "  valid until 2023-11-16 12:00:00",
        "",
        f"  valid until {2**61} ms",
    ]


def test_no_text_reaches_the_terminal_unescaped() -> None:
    """Control characters in a user id, a name or an item id are printed as escapes."""
    bad = "\x1b[31m"
    change = replace(of_values({bad: [bad], "top": [[bad, 1]]}), user=bad)
    assert not any("\x1b" in line for line in [*plain(change), *plain(Tombstone(bad, 1)), *plain(embedding(bad, 1))])
    assert plain(Tombstone(bad, 1)) == ["\\x1b[31m  forgotten  offset 1"]
