"""The trigger policy: when a user's embedding is wanted, and how it is read from TOML and validated.

    [triggers]
    every_n = 10                       # encode after this many unencoded actions; 0: never
    strong = ["purchase", "repin"]     # action types that are encoded at once
    first_n = 5                        # encode each of a new user's first actions
    max_staleness_ms = 60_000          # an unencoded action waits no longer than this; 0: no bound
    session_gap_ms = 1_800_000         # the session ends after this long without an action; 0: off
    cooldown_ms = 1_000                # minimum time between two embeddings of a user
    spread_ms = 5_000                  # deadlines of many users are spread over this time, by a phase per user
    priorities = ["strong", "first_n", "session_end", "max_staleness", "every_n"]   # the last are shed first

Without a file every action is encoded. `streams.core.triggers` applies a policy.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from encoder.actions.columns import name_code
from encoder.arrays import U8, Bool
from streams.errors import CannotStart


class Reason(IntEnum):
    """Why a user is due; the numbers are stored in state and never reused."""

    EVERY_N = 1
    STRONG = 2
    FIRST_N = 3
    MAX_STALENESS = 4
    SESSION_END = 5

    @property
    def label(self) -> str:
        """Name in policies, headers and metric labels."""
        return self.name.lower()


BY_LABEL = {reason.label: reason for reason in Reason}
DURATION_MS_MAX = 366 * 24 * 3600 * 1000
COUNT_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class TriggerPolicy:
    """The rules by which users become due; the default encodes every action."""

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
    """Reasons, most valuable first: the last are shed first, and of two reasons a user keeps the more valuable one."""

    @property
    def has_timers(self) -> bool:
        """True when an action that fires nothing still gets a deadline."""
        return bool(self.max_staleness_ms or self.session_gap_ms)

    def ranks(self) -> U8:
        """Return the place of each reason in `priorities` [len(Reason) + 1]; reason 0, "not due", comes last."""
        ranks = np.full(len(Reason) + 1, len(Reason), np.uint8)
        ranks[list(self.priorities)] = np.arange(len(self.priorities))
        return ranks

    def strong_codes(self) -> Bool:
        """Return whether each action code is strong [65536]."""
        table = np.zeros(65_536, np.bool_)
        table[[name_code(name) for name in self.strong]] = True
        return table


class PolicyError(CannotStart):
    """A trigger policy is not valid; `problems` lists every problem with the path of its key."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("trigger policy is not valid: " + "; ".join(problems))


_LIMITS = {
    "every_n": COUNT_MAX,
    "first_n": COUNT_MAX,
    "max_staleness_ms": DURATION_MS_MAX,
    "session_gap_ms": DURATION_MS_MAX,
    "cooldown_ms": DURATION_MS_MAX,
    "spread_ms": DURATION_MS_MAX,
}


def parse_policy(toml_text: str) -> TriggerPolicy:
    """Read the `[triggers]` table and ignore other tables; raise `PolicyError` with every problem at once."""
    try:
        document = tomllib.loads(toml_text)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError([f"not TOML: {error}"]) from error
    problems = [
        f"{key}: is outside every table; write it below [triggers]"
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
        problems.append("triggers: no trigger ever fires; set every_n or a timer")
    if 0 < policy.max_staleness_ms < policy.cooldown_ms:
        problems.append(
            "triggers.cooldown_ms: must not exceed max_staleness_ms, because the staleness bound could not hold"
        )
    if 0 < policy.max_staleness_ms <= policy.spread_ms:
        problems.append("triggers.spread_ms: must be below max_staleness_ms, because it moves those deadlines forward")
    return problems
