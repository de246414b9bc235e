"""The cut between the past and the replayed events."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from infra.datasets.event_log import EventLog, event_log
from infra.demo.split import DAY_MS, WEEK_MS, LogTooShort, cut_at_midnight, distinct_items, moved, with_ratings


def _log(times_ms: list[int]) -> EventLog:
    count = len(times_ms)
    return event_log(
        pa.table(
            {
                "user_id": [f"u{i % 3}" for i in range(count)],
                "item_id": [f"i{i % 2}" for i in range(count)],
                "action": ["view"] * count,
                "timestamp_ms": pa.array(times_ms, pa.int64()),
            }
        )
    )


def test_the_cut_is_the_last_midnight_that_leaves_enough() -> None:
    """The newer part begins with the first event of a day, has enough events, and would not with one day less."""
    log = _log([DAY_MS - 5, DAY_MS + 1, DAY_MS + 9, 2 * DAY_MS, 2 * DAY_MS + 3, 3 * DAY_MS])
    assert cut_at_midnight("", log, 1).cut == 5
    assert cut_at_midnight("", log, 2).cut == 3
    assert cut_at_midnight("", log, 4).cut == 1


def test_both_parts_together_are_the_log() -> None:
    """Every event is in exactly one part, and users keep their numbers."""
    parts = cut_at_midnight("", _log([0, 5, DAY_MS, DAY_MS + 4]), 2)
    both = np.concatenate([parts.older.user_index, parts.newer.user_index])
    assert both.tolist() == parts.log.user_index.tolist()
    assert len(parts.newer.table) == len(parts.newer) == 2
    assert parts.newer.user_keys == parts.log.user_keys


def test_a_log_within_one_day_is_rejected() -> None:
    """A log without a midnight has nothing to train on, which is one clear error."""
    with pytest.raises(LogTooShort, match="too short for the demo"):
        cut_at_midnight("", _log([1, 2, 3]), 2)


def test_items_are_named_by_row() -> None:
    """The index of a row leads to the id of its item."""
    ids, index = distinct_items(_log([0, 1, 2]))
    assert [ids[i] for i in index] == ["i0", "i1", "i0"]


def test_times_are_moved_by_whole_weeks() -> None:
    """The last event is at most a week old, no event is in the future, and everything else stays."""
    now_ms = 3_000 * WEEK_MS + 12_345
    log = _log([5, DAY_MS, DAY_MS - 7])
    later = moved(log, now_ms)
    (by_ms,) = set((later.timestamp_ms - log.timestamp_ms).tolist())
    assert by_ms % WEEK_MS == 0
    assert now_ms - WEEK_MS < later.latest_ms.max() <= now_ms
    assert later.table["timestamp_ms"].to_pylist() == later.timestamp_ms.tolist()
    assert np.diff(later.latest_ms).tolist() == np.diff(log.latest_ms).tolist()
    rest = ["user_id", "item_id", "action", "event_id"]
    assert later.table.select(rest) == log.table.select(rest)


def test_the_rating_of_an_action_is_its_value() -> None:
    """`rated_4` has the value 4, as a column and in the records."""
    log = with_ratings(replace(_log([1]), table=_log([1]).table.set_column(2, "action", pa.array(["rated_4"]))))
    assert log.table["value"].to_pylist() == [4.0]
    ((_, value),) = log.records(np.arange(1))
    assert json.loads(value)["value"] == 4.0
