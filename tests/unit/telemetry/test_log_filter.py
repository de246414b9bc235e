"""Lines of libraries are logged at most once per second; our own lines are always logged."""

from __future__ import annotations

import logging

from streams.telemetry.log_filter import RepeatFilter


def passed(times_s: list[float], name: str = "aiokafka.producer.sender", line: int = 7) -> list[str]:
    """Return the messages that pass of records logged at these times at one place."""
    repeats, messages = RepeatFilter(exempt="streams"), []
    for number, time_s in enumerate(times_s):
        record = logging.LogRecord(name, logging.ERROR, "sender.py", line, "no leader for %d", (number,), None)
        record.created = time_s
        if repeats.filter(record):
            messages.append(record.getMessage())
    return messages


def test_a_repeated_line_passes_once_per_second_and_counts_the_others() -> None:
    """A line passes once per second; the next one that passes states how many were left out."""
    assert passed([10.0, 10.1, 10.2, 10.9, 11.05, 13.0]) == [
        "no leader for 0",
        "no leader for 4 (3 more like it left out)",
        "no leader for 5",
    ]


def test_our_own_lines_are_never_left_out() -> None:
    """The worker's own log is complete at any rate."""
    assert len(passed([10.0, 10.0, 10.0], name="streams.ingest")) == 3


def test_lines_of_different_places_do_not_hide_each_other() -> None:
    """Lines that two places of one library log at the same time both pass."""
    repeats = RepeatFilter(exempt="streams")
    for line in (1, 2):
        assert repeats.filter(logging.LogRecord("aiokafka", logging.ERROR, "sender.py", line, "x", (), None))
