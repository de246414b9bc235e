"""Identities: which differences between a state and the logs at hand are found, and which cannot be."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest

from streams.core.layout import StateLimits
from streams.storage.codec import CheckpointMark
from streams.storage.identity import Identity, LastRecord, differences, layout_of

HELD = Identity("cluster", "actions", "id-1", "id-2", layout_of(StateLimits()))


@pytest.mark.parametrize("field", [each.name for each in fields(Identity)])
def test_every_field_is_compared(field: str) -> None:
    """A change of any one field is found, alone, and both values are named."""
    (text,) = differences(HELD, replace(HELD, **{field: "other"}))
    assert "other" in text
    assert (getattr(HELD, field) or "none") in text
    assert not list(differences(HELD, HELD))


@pytest.mark.parametrize("field", ["cluster_id", "source_topic_id", "changelog_topic_id"])
def test_an_unknown_id_cannot_differ(field: str) -> None:
    """A broker that reports no id, before or now, makes no difference."""
    unknown = replace(HELD, **{field: ""})
    assert not list(differences(HELD, unknown))
    assert not list(differences(unknown, HELD))


def test_source_ids_distinguish_lives() -> None:
    """Outputs of one log carry one id, and another after each life; without an identity they carry none."""
    marks = [CheckpointMark(0, 0), CheckpointMark(0, 0, HELD), CheckpointMark(0, 0, HELD, life=2)]
    assert [mark.source_id for mark in marks] == ["", "id-1", "id-1/2"]


@dataclass(frozen=True)
class Consumed:
    """A record as a consumer returns it."""

    offset: int = 7
    timestamp: int = 1_000
    key: bytes | None = b"ann"
    value: bytes | None = b"{}"


@pytest.mark.parametrize(
    "change", [{"timestamp": 1_001}, {"key": b"an"}, {"key": None}, {"value": b"{ }"}, {"value": None}]
)
def test_any_other_record_has_another_checksum(change: dict[str, object]) -> None:
    """Time, key and value all count, and bytes do not wander from key to value."""
    one = LastRecord.of(Consumed())
    assert LastRecord.of(Consumed()) == one
    assert LastRecord.of(replace(Consumed(), **change)) != one  # type: ignore[arg-type]
    assert LastRecord.of(Consumed(key=b"a", value=b"bc")) != LastRecord.of(Consumed(key=b"ab", value=b"c"))
    assert LastRecord.of(Consumed(key=b"", value=None)) != LastRecord.of(Consumed(key=None, value=b""))
