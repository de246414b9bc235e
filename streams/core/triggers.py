"""Triggers: when a user's embedding is wanted, and why.

`TriggerPolicy` is read from the `[triggers]` table of a TOML file and validated whole. The functions below it decide
for many users at once, on columns, with the processing time as a parameter:

- an action fires `strong`, `first_n` or `every_n` at once;
- an unencoded action that fired nothing waits for `max_staleness` or `session_end`, a *deadline*;
- `cooldown` turns whatever fires too early into a deadline of its own.

    [triggers]
    every_n = 10                       # after so many unencoded actions; 0: never
    strong = ["purchase", "repin"]     # action types that are encoded at once
    first_n = 5                        # each of a new user's first actions
    max_staleness_ms = 60_000          # an unencoded action waits no longer than this; 0: for ever
    session_gap_ms = 1_800_000         # without an action for so long the session has ended; 0: off
    cooldown_ms = 1_000                # at least this long between two embeddings of a user
    spread_ms = 5_000                  # deadlines of many users are spread over this time, by a phase per user
    priorities = ["strong", "first_n", "session_end", "max_staleness", "every_n"]   # the last are shed first

Without a file every action is encoded.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from encoder.actions.columns import name_code
from encoder.arrays import I64, U8, Bool
from streams.core.layout import NEVER, Columns


class Reason(IntEnum):
    """Why a user is due. Stored in state: numbers are never reused."""

    EVERY_N = 1
    STRONG = 2
    FIRST_N = 3
    MAX_STALENESS = 4
    SESSION_END = 5

    @property
    def label(self) -> str:
        """As it stands in policies, headers and metric labels."""
        return self.name.lower()


BY_LABEL = {reason.label: reason for reason in Reason}
DURATION_MS_MAX = 366 * 24 * 3600 * 1000
COUNT_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class TriggerPolicy:
    """When users are due; the default encodes every action."""

    every_n: int = 1
    strong: frozenset[str] = frozenset()
    first_n: int = 0
    max_staleness_ms: int = 0
    session_gap_ms: int = 0
    cooldown_ms: int = 0
    spread_ms: int = 0
    priorities: tuple[Reason, ...] = (
        Reason.STRONG,
        Reason.FIRST_N,
        Reason.SESSION_END,
        Reason.MAX_STALENESS,
        Reason.EVERY_N,
    )
    """Most valuable first; the last are shed first, and a user due for two reasons keeps the more valuable one."""

    @property
    def has_timers(self) -> bool:
        return bool(self.max_staleness_ms or self.session_gap_ms)

    def ranks(self) -> U8:
        """[len(Reason) + 1]: place of each reason in `priorities`; "not due" comes last."""
        ranks = np.full(len(Reason) + 1, len(Reason), np.uint8)
        ranks[list(self.priorities)] = np.arange(len(self.priorities))
        return ranks

    def strong_codes(self) -> Bool:
        """[65536]: whether an action code is strong."""
        table = np.zeros(65_536, np.bool_)
        table[[name_code(name) for name in self.strong]] = True
        return table


class PolicyError(Exception):
    """A trigger policy is not valid; `problems` lists every fault with its key path."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("trigger policy is not valid: " + "; ".join(problems))


# Deciding, on columns ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Touched:
    """What a batch did to each of the users it changed."""

    fresh: I64
    """[U], applied actions that no published embedding contains."""
    strong: Bool
    """[U], whether one of them is strong."""
    first: Bool
    """[U], whether one of them is among the user's first `first_n`."""


@dataclass(frozen=True, slots=True)
class Triggers:
    """A policy made ready for columns."""

    policy: TriggerPolicy
    ranks: U8 = field(init=False)
    priorities: I64 = field(init=False)
    """[len(Reason) + 1]: priority of each reason in the encode queue, 1 and up; a higher one goes first."""
    strong_codes: Bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", self.policy.ranks())
        object.__setattr__(self, "priorities", len(Reason) - self.ranks.astype(np.int64))
        object.__setattr__(self, "strong_codes", self.policy.strong_codes())

    def on_actions(self, headers: Columns, live: Columns, touched: Touched, now_ms: int) -> Bool:
        """Count the fresh actions, fire, and return who is to be handed over for encoding now.

        `headers` and `live` are the columns of the U touched users and are changed in place; a user that must wait
        has its deadline in `due_ms`.
        """
        is_fresh = touched.fresh > 0
        # Never in the future: a clock that was set back must not make anyone wait longer.
        since_ms = np.where(headers["unencoded"] == 0, now_ms, np.minimum(headers["first_unencoded_ms"], now_ms))
        headers["first_unencoded_ms"] = np.where(is_fresh, since_ms, headers["first_unencoded_ms"])
        headers["unencoded"] += touched.fresh.astype(np.uint32)
        self._count_since_job(live, touched.fresh, is_fresh, now_ms)
        reasons = self._reasons(headers, live, touched)
        fired = is_fresh & (reasons > 0)
        self._want(headers, fired, reasons)
        if self.policy.has_timers and not fired.all():
            self.set_timers(headers, live)
        return self._hand_over(headers, live, fired, now_ms)

    def on_deadline(self, headers: Columns, live: Columns, now_ms: int) -> Bool:
        """Fire the timers of users whose `due_ms` has come; return who is to be handed over for encoding now."""
        waiting = headers["reason"] == 0
        stale_ms = self._stale_ms(headers, live)
        reasons = np.where(stale_ms <= now_ms, Reason.MAX_STALENESS, Reason.SESSION_END).astype(np.uint8)
        fired = waiting & (headers["unencoded"] > 0)
        self._want(headers, fired, reasons)
        headers["due_ms"][headers["reason"] == 0] = NEVER
        return self._hand_over(headers, live, headers["reason"] != 0, now_ms)

    def set_timers(self, headers: Columns, live: Columns) -> None:
        """Put the deadline of users that are not due, as their unencoded actions and last action say."""
        is_due = headers["reason"] != 0
        deadline: I64 | int = NEVER
        if self.policy.has_timers:
            earliest = np.minimum(self._stale_ms(headers, live), self._session_ms(live))
            deadline = np.where(headers["unencoded"] > 0, earliest, NEVER)
        headers["due_ms"] = np.where(is_due, headers["due_ms"], deadline)

    def _count_since_job(self, live: Columns, fresh: I64, is_fresh: Bool, now_ms: int) -> None:
        live["since_job_ms"][is_fresh & (live["since_job"] == 0)] = now_ms
        live["since_job"] += fresh.astype(np.uint32)
        live["last_applied_ms"] = now_ms

    def _reasons(self, headers: Columns, live: Columns, touched: Touched) -> U8:
        """[U]: the most valuable reason that fires, 0 for none. What is being encoded does not count any more."""
        policy, reasons = self.policy, np.zeros(len(headers), np.uint8)
        waiting = np.where(live["in_job"], live["since_job"], headers["unencoded"])
        for reason in reversed(policy.priorities):
            if reason is Reason.EVERY_N and policy.every_n:
                reasons[waiting >= policy.every_n] = reason
            elif reason is Reason.STRONG and policy.strong:
                reasons[touched.strong] = reason
            elif reason is Reason.FIRST_N and policy.first_n:
                reasons[touched.first] = reason
        return reasons

    def _want(self, headers: Columns, fired: Bool, reasons: U8) -> None:
        """Note that an embedding of everything applied is wanted; the more valuable of two reasons stays."""
        better = fired & (self.ranks[reasons] < self.ranks[headers["reason"]])
        headers["reason"] = np.where(better, reasons, headers["reason"])
        headers["due_offset"] = np.where(fired, headers["applied_offset"], headers["due_offset"])

    def _hand_over(self, headers: Columns, live: Columns, due: Bool, now_ms: int) -> Bool:
        """Of the `due` users, those out of cooldown and not yet queued; the others get the end of it as deadline.

        Whoever is due has a deadline, also while queued or in work: it is what a restart finds them by.
        """
        ready_ms = np.minimum(headers["last_encoded_ms"], now_ms) + self.policy.cooldown_ms
        cooling = due & (ready_ms > now_ms) & ~live["queued"]
        go: Bool = due & ~cooling & ~live["queued"]
        at_latest_ms = np.where(due, np.minimum(headers["due_ms"], now_ms), headers["due_ms"])
        headers["due_ms"] = np.where(cooling, ready_ms, at_latest_ms)
        headers["last_encoded_ms"] = np.where(go, now_ms, headers["last_encoded_ms"])
        live["queued"] |= go
        return go

    def _stale_ms(self, headers: Columns, live: Columns) -> I64:
        """[U]: when the oldest unencoded action becomes too stale, earlier by the user's phase; never later."""
        if not self.policy.max_staleness_ms:
            return np.full(len(headers), NEVER)
        stale: I64 = headers["first_unencoded_ms"] + (self.policy.max_staleness_ms - live["phase_ms"])
        return stale

    def _session_ms(self, live: Columns) -> I64:
        """[U]: when the session of the last action has ended, later by the user's phase; never earlier."""
        if not self.policy.session_gap_ms:
            return np.full(len(live), NEVER)
        ended: I64 = live["last_applied_ms"] + (self.policy.session_gap_ms + live["phase_ms"])
        return ended


# Reading a policy ----------------------------------------------------------------------------------------------------

_LIMITS = {
    "every_n": COUNT_MAX,
    "first_n": COUNT_MAX,
    "max_staleness_ms": DURATION_MS_MAX,
    "session_gap_ms": DURATION_MS_MAX,
    "cooldown_ms": DURATION_MS_MAX,
    "spread_ms": DURATION_MS_MAX,
}


def parse_policy(toml_text: str) -> TriggerPolicy:
    """Read the `[triggers]` table; other tables are left to others. Raises `PolicyError` with every problem at once."""
    try:
        document = tomllib.loads(toml_text)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError([f"not TOML: {error}"]) from error
    problems = [
        f"{key}: stands outside every table; write it below [triggers]"
        for key, value in document.items()
        if not isinstance(value, dict)
    ]
    table = document.get("triggers", {})
    policy = _read_table(table, problems) if isinstance(table, dict) else TriggerPolicy()
    problems += _contradictions(policy)
    if problems:
        raise PolicyError(problems)
    return policy


def _read_table(table: Mapping[str, Any], problems: list[str]) -> TriggerPolicy:
    read: dict[str, Any] = {}
    for key, value in table.items():
        path = f"triggers.{key}"
        if key in _LIMITS:
            read[key] = _read_number(path, value, _LIMITS[key], problems)
        elif key == "strong":
            read[key] = frozenset(_read_names(path, value, problems))
        elif key == "priorities":
            read[key] = _read_priorities(path, value, problems)
        else:
            problems.append(f"{path}: unknown key; known are {', '.join([*_LIMITS, 'strong', 'priorities'])}")
    return TriggerPolicy(**read)


def _read_number(path: str, value: object, limit: int, problems: list[str]) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit:
        return value
    problems.append(f"{path}: must be a whole number from 0 to {limit}, not {value!r}")
    return 0


def _read_names(path: str, value: object, problems: list[str]) -> list[str]:
    if not isinstance(value, list):
        problems.append(f"{path}: must be a list of action types, not {value!r}")
        return []
    for index, name in enumerate(value):
        if not isinstance(name, str) or not name:
            problems.append(f"{path}[{index}]: must be the name of an action type, not {name!r}")
    return [name for name in value if isinstance(name, str) and name]


def _read_priorities(path: str, value: object, problems: list[str]) -> tuple[Reason, ...]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value) and sorted(value) == sorted(BY_LABEL):
        return tuple(BY_LABEL[name] for name in value)
    problems.append(f"{path}: must name each of {', '.join(BY_LABEL)} once, not {value!r}")
    return TriggerPolicy().priorities


def _contradictions(policy: TriggerPolicy) -> list[str]:
    problems = []
    if not (policy.every_n or policy.strong or policy.first_n or policy.has_timers):
        problems.append("triggers: nothing ever fires; set every_n or a timer")
    if 0 < policy.max_staleness_ms < policy.cooldown_ms:
        problems.append("triggers.cooldown_ms: must not exceed max_staleness_ms, or the staleness bound cannot hold")
    if 0 < policy.max_staleness_ms <= policy.spread_ms:
        problems.append("triggers.spread_ms: must be below max_staleness_ms, whose deadlines it brings forward")
    return problems
