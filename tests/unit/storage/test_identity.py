"""Identities: which differences between a state and the logs at hand are found, and which cannot be."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from streams.core.layout import StateLimits
from streams.storage.codec import CheckpointMark
from streams.storage.identity import Identity, differences, layout_of

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
