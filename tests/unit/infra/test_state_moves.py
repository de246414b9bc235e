"""`streamformer state skip` writes the right mark for a log that has grown again after a truncation, and for others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from infra.state.rewrite import Move, check_move
from streams.engine.proof import COMMITTED_BY, Found, Names, prove
from streams.storage.codec import CheckpointMark
from streams.storage.identity import Identity, LastRecord

IDENTITY = Identity("cluster", "actions", "id-1", "id-2", "")
MARK = CheckpointMark(100, 7, IDENTITY, last=LastRecord(98, 5))
FOUND = Found(MARK, 100, COMMITTED_BY, 0, 130, IDENTITY, LastRecord(98, 6))
APP: Any = None


def test_a_skip_ends_the_halt_of_an_overwritten_log() -> None:
    """The state gets another life, its offsets are rebased, and the record that is gone is not compared again."""
    move = Move(APP, 2, FOUND, 100, "skip")
    check_move(move)
    assert move.is_truncated
    assert "truncated and has grown to 130" in move.describe()
    mark = move.new_mark(40)
    assert (mark.source_offset, mark.output_offset, mark.life, mark.last) == (100, 40, 1, None)
    assert "skip from offset 100 to 100" in mark.operations[-1]
    assert prove(Names("app", "actions", "log", 2), replace(FOUND, mark=mark)).mark == mark


@pytest.mark.parametrize("to", [90, 110])
def test_a_skip_within_an_unchanged_log_keeps_the_life(to: int) -> None:
    """A move in a log whose last record is the same rewrites no user."""
    move = Move(APP, 2, replace(FOUND, last=MARK.last), to, "skip")
    assert not move.is_truncated
    mark = move.new_mark(40)
    assert (mark.source_offset, mark.output_offset, mark.life, mark.last) == (to, 7, 0, None)
