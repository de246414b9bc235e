"""Trigger policies: read whole, with every problem reported at once."""

from __future__ import annotations

import numpy as np
import pytest

from streams.core.policy import PolicyError, Reason, TriggerPolicy, parse_policy


def test_policy_is_read() -> None:
    """Every key of the table reaches the policy; other tables are ignored."""
    text = """
    [features]
    windows = ["1h"]
    [triggers]
    every_n = 10
    strong = ["purchase"]
    first_n = 5
    max_staleness_ms = 60_000
    session_gap_ms = 1_800_000
    cooldown_ms = 1_000
    spread_ms = 5_000
    priorities = ["every_n", "strong", "first_n", "max_staleness", "session_end"]
    """
    reasons = (Reason.EVERY_N, Reason.STRONG, Reason.FIRST_N, Reason.MAX_STALENESS, Reason.SESSION_END)
    expected = TriggerPolicy(10, frozenset({"purchase"}), 5, 60_000, 1_800_000, 1_000, 5_000, reasons)
    assert parse_policy(text) == expected
    assert parse_policy("") == TriggerPolicy()


def test_every_problem_is_reported_at_once() -> None:
    """Each problem is reported with the path of its key, all in one error."""
    text = """
    every_n = 3
    [triggers]
    every_n = -1
    strong = ["purchase", 7]
    first_n = true
    max_staleness_ms = 1.5
    cooldown_ms = "1s"
    priorities = ["strong"]
    colour = "red"
    """
    with pytest.raises(PolicyError) as caught:
        parse_policy(text)
    paths = [problem.split(":")[0] for problem in caught.value.problems]
    assert paths == [
        "every_n",
        "triggers.every_n",
        "triggers.strong[1]",
        "triggers.first_n",
        "triggers.max_staleness_ms",
        "triggers.cooldown_ms",
        "triggers.priorities",
        "triggers.colour",
    ]


@pytest.mark.parametrize(
    ("table", "path"),
    [
        ("every_n = 0", "triggers"),
        ("max_staleness_ms = 100\ncooldown_ms = 200", "triggers.cooldown_ms"),
        ("max_staleness_ms = 100\nspread_ms = 100", "triggers.spread_ms"),
    ],
)
def test_policy_that_contradicts_itself_is_rejected(table: str, path: str) -> None:
    """A policy under which nothing fires, or whose bounds cannot hold, is rejected."""
    with pytest.raises(PolicyError) as caught:
        parse_policy(f"[triggers]\n{table}")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [path]


def test_text_that_is_no_toml_is_one_problem() -> None:
    """Invalid TOML is one problem, with the parser's message."""
    with pytest.raises(PolicyError, match="not TOML: Expected"):
        parse_policy("[triggers")


def test_reason_numbers_are_fixed() -> None:
    """Reasons are stored by number, so their numbers never change."""
    assert {reason.label: int(reason) for reason in Reason} == {
        "every_n": 1,
        "strong": 2,
        "first_n": 3,
        "max_staleness": 4,
        "session_end": 5,
    }
    assert np.uint8(Reason.SESSION_END) == 5
