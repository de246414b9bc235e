"""The proof: where a partition continues, and which states are rejected with which ways on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from streams.engine.proof import (
    COMMITTED_BY,
    Found,
    IncompleteRestore,
    Names,
    OffsetsMoved,
    SourceTruncated,
    WrongIdentity,
    prove,
)
from streams.storage.codec import CheckpointMark
from streams.storage.identity import Identity, LastRecord

NAMES = Names("app", "actions", "app-changelog", 2)
IDENTITY = Identity("cluster", "actions", "id-1", "id-2", "8 actions in chunks of 2")
MARK = CheckpointMark(100, 7, IDENTITY)
FOUND = Found(MARK, 100, COMMITTED_BY, 0, 130, IDENTITY)


def test_the_rule() -> None:
    """A mark at the committed offset continues there, without a line and without an extra checkpoint."""
    proven = prove(NAMES, FOUND)
    assert (proven.mark, proven.expired, proven.must_write, proven.lines) == (MARK, 0, False, [])


def test_a_first_start_begins_at_the_first_record() -> None:
    """Without a mark and a committed offset there is nothing to prove."""
    proven = prove(NAMES, replace(FOUND, mark=None, committed=None, earliest=40))
    assert proven.mark == CheckpointMark(40, 0, IDENTITY)
    assert (proven.must_write, proven.lines) == (False, [])


@pytest.mark.parametrize(
    "field", ["cluster_id", "source_topic", "source_topic_id", "changelog_topic_id", "feature_set"]
)
def test_state_of_another_log_names_both_ways_on(field: str) -> None:
    """Any other identity is rejected, even at the right offsets, in one line that names adopt and a new app_id."""
    with pytest.raises(WrongIdentity, match=r"other.*`streamformer state adopt`.*new app_id") as error:
        prove(NAMES, replace(FOUND, identity=replace(IDENTITY, **{field: "other"})))
    assert "\n" not in str(error.value)


def test_another_layout_names_both_sizes() -> None:
    """State of other sizes is rejected before a user is read, with both sizes and what to restore."""
    with pytest.raises(WrongIdentity, match="written with 8 actions in chunks of 2, the settings have 9 in 3: restore"):
        prove(NAMES, replace(FOUND, identity=replace(IDENTITY, layout="9 in 3")))


def test_state_of_an_earlier_version_is_taken_over_once() -> None:
    """A mark without identity continues, says so, and the next checkpoint writes the identity."""
    proven = prove(NAMES, replace(FOUND, mark=CheckpointMark(100, 7), metadata=""))
    assert (proven.mark, proven.must_write) == (MARK, True)
    (line,) = proven.lines
    assert "taken over, once" in line
    assert "id-1" in line
    assert prove(NAMES, replace(FOUND, mark=proven.mark)).lines == []


def test_a_half_rewritten_state_is_rejected() -> None:
    """A mark that names an unfinished command does not start, and the command is named."""
    with pytest.raises(WrongIdentity, match="`streamformer state adopt --at latest` was interrupted"):
        prove(NAMES, replace(FOUND, mark=replace(MARK, unfinished="streamformer state adopt --at latest")))


def test_a_truncated_log_is_rejected() -> None:
    """State beyond the end of the log does not start: new events would get offsets that count as applied."""
    with pytest.raises(SourceTruncated, match=r"ends at offset 90.*up to offset 100.*skip --partition 2 --to 90"):
        prove(NAMES, replace(FOUND, end=90))
    assert prove(NAMES, replace(FOUND, end=100)).mark == MARK


def test_a_log_that_was_truncated_and_has_grown_again_is_rejected() -> None:
    """Another record at the place of the last one applied is rejected with the ways on, in one line."""
    mark = replace(MARK, last=LastRecord(98, 5))
    with pytest.raises(SourceTruncated, match=r"record at offset 98.*skip --partition 2 --to 100.*adopt") as error:
        prove(NAMES, replace(FOUND, mark=mark, last=LastRecord(98, 6)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("held", "found"),
    [
        (LastRecord(98, 5), LastRecord(98, 5)),
        (LastRecord(98, 5), None),  # deleted by retention
        (None, LastRecord(98, 5)),  # a mark of an earlier release
        (None, None),
    ],
)
def test_the_same_or_an_unknown_last_record_continues(held: LastRecord | None, found: LastRecord | None) -> None:
    """An equal record, or none to compare with, is no reason to reject; the mark keeps what it holds."""
    mark = replace(MARK, last=held)
    proven = prove(NAMES, replace(FOUND, mark=mark, last=found))
    assert (proven.mark, proven.must_write) == (mark, False)


def test_expired_events_are_counted_exactly() -> None:
    """Events between the mark and the first record are counted, and the partition continues at that record."""
    proven = prove(NAMES, replace(FOUND, earliest=130))
    assert (proven.expired, proven.mark.source_offset) == (30, 130)
    assert prove(NAMES, replace(FOUND, earliest=100)).expired == 0


def test_a_lost_changelog_is_not_blamed_on_an_operator() -> None:
    """An offset that a checkpoint committed, beyond the mark, proves that the changelog has lost records."""
    for found in (replace(FOUND, committed=120), replace(FOUND, mark=None)):
        with pytest.raises(IncompleteRestore, match="has lost records"):
            prove(NAMES, found)


def test_an_offset_moved_forward_is_named_with_the_commands() -> None:
    """An offset that no checkpoint committed is an operator's: the line has both numbers and the way to either."""
    with pytest.raises(OffsetsMoved, match=r"forward to 120.*before 100.*skip the 20 offsets.*--to 120.*--to 100"):
        prove(NAMES, replace(FOUND, committed=120, metadata=""))


@pytest.mark.parametrize(("committed", "text"), [(60, "back to 60"), (None, "has no committed offset")])
def test_an_offset_moved_back_is_reported_and_the_state_continues(committed: int | None, text: str) -> None:
    """The state is ahead of the group: it continues where it is, says so, and commits its offset again."""
    proven = prove(NAMES, replace(FOUND, committed=committed, metadata=""))
    assert (proven.mark, proven.must_write, proven.rewound) == (MARK, True, committed is not None)
    assert text in proven.lines[0]
    assert "state skip --partition 2" in proven.lines[0]
