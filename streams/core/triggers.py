"""Triggers: which users are due, and why, decided for many users at once on columns.

The processing time is a parameter. `streams.core.policy` describes the policy; it is applied as follows:

- an action fires `strong`, `first_n` or `every_n` at once;
- an unencoded action that fired nothing waits for `max_staleness` or `session_end`, a *deadline*;
- `cooldown` turns a trigger that fires too early into a deadline of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from encoder.arrays import I64, U8, Bool
from streams.core.columns import Columns
from streams.core.layout import NEVER
from streams.core.policy import Reason, TriggerPolicy


@dataclass(frozen=True, slots=True)
class Touched:
    """Changes that a batch made, per user."""

    fresh: I64
    """[U], applied actions that no published embedding contains."""
    strong: Bool
    """[U], whether one of these actions is strong."""
    first: Bool
    """[U], whether one of the actions is among the user's first `first_n`."""


@dataclass(frozen=True, slots=True)
class Triggers:
    """A policy, prepared for decisions on columns of U users."""

    policy: TriggerPolicy
    ranks: U8 = field(init=False)
    """[len(Reason) + 1], see `TriggerPolicy.ranks`."""
    priorities: I64 = field(init=False)
    """[len(Reason) + 1], priority of each reason in the encode queue, from 1; a higher one is taken first."""
    strong_codes: Bool = field(init=False)
    """[65536], see `TriggerPolicy.strong_codes`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", self.policy.ranks())
        object.__setattr__(self, "priorities", len(Reason) - self.ranks.astype(np.int64))
        object.__setattr__(self, "strong_codes", self.policy.strong_codes())

    def on_actions(self, headers: Columns, live: Columns, touched: Touched, now_ms: int) -> Bool:
        """Count the fresh actions, fire triggers, and return which users are to be handed over now [U].

        The columns of the U touched users, `headers` and `live`, are changed in place. A user that must wait gets a
        deadline in `due_ms`.
        """
        is_fresh = touched.fresh > 0
        # Not in the future: a clock that was set back must not make a user wait longer.
        since_ms = np.where(headers["unencoded"] == 0, now_ms, np.minimum(headers["first_unencoded_ms"], now_ms))
        headers["first_unencoded_ms"] = np.where(is_fresh, since_ms, headers["first_unencoded_ms"])
        headers["unencoded"] += touched.fresh.astype(np.uint32)
        self._count_since_job(live, touched.fresh, is_fresh, now_ms)
        reasons = self._reasons(headers, live, touched)
        fired = is_fresh & (reasons > 0)
        promoted = self._want(headers, fired, reasons)
        if self.policy.has_timers and not fired.all():
            self.set_timers(headers, live)
        return self._hand_over(headers, live, fired, promoted, now_ms)

    def on_deadline(self, headers: Columns, live: Columns, now_ms: int) -> Bool:
        """Fire the timers of users whose `due_ms` has come; return which users are to be handed over now [U]."""
        waiting = headers["reason"] == 0
        is_stale = self._stale_ms(headers, live) <= now_ms
        reasons = np.where(is_stale, Reason.MAX_STALENESS, Reason.SESSION_END).astype(np.uint8)
        # A user that was shed for a lesser reason is promoted once its staleness bound has passed.
        fired = (waiting | is_stale) & (headers["unencoded"] > 0)
        promoted = self._want(headers, fired, reasons)
        headers["due_ms"][headers["reason"] == 0] = NEVER
        return self._hand_over(headers, live, headers["reason"] != 0, promoted, now_ms)

    def set_timers(self, headers: Columns, live: Columns) -> None:
        """Set the deadline of users that are not due, from the times of their unencoded actions and last action."""
        is_due = headers["reason"] != 0
        deadline: I64 | int = NEVER
        if self.policy.has_timers:
            earliest = np.minimum(self._stale_ms(headers, live), self._session_ms(live))
            deadline = np.where(headers["unencoded"] > 0, earliest, NEVER)
        headers["due_ms"] = np.where(is_due, headers["due_ms"], deadline)

    def _count_since_job(self, live: Columns, fresh: I64, is_fresh: Bool, now_ms: int) -> None:
        """Count the fresh actions since the last job began, and keep the time of the first."""
        live["since_job_ms"][is_fresh & (live["since_job"] == 0)] = now_ms
        live["since_job"] += fresh.astype(np.uint32)
        live["last_applied_ms"] = now_ms

    def _reasons(self, headers: Columns, live: Columns, touched: Touched) -> U8:
        """Return the most valuable reason that fires [U], 0 for none; actions that are being encoded do not count."""
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

    def _want(self, headers: Columns, fired: Bool, reasons: U8) -> Bool:
        """Make users due for an embedding of all that is applied; of two reasons the more valuable one is kept.

        Return the users whose reason is more valuable than before [U].
        """
        better: Bool = fired & (self.ranks[reasons] < self.ranks[headers["reason"]])
        headers["reason"] = np.where(better, reasons, headers["reason"])
        headers["due_offset"] = np.where(fired, headers["applied_offset"], headers["due_offset"])
        return better

    def _hand_over(self, headers: Columns, live: Columns, due: Bool, promoted: Bool, now_ms: int) -> Bool:
        """Return the users to put into the encode queue [U]: due ones that wait for nothing, and promoted ones.

        A queued user is handed over again only if it is promoted, so that the queue moves it up. A user that cools down
        is due when it has cooled. A user that was shed or whose job failed waits until `retry_ms`, unless it is
        promoted. Every due user has a deadline, even while it is queued or in a job, because a restart finds it by its
        deadline.
        """
        ready_ms = np.minimum(headers["last_encoded_ms"], now_ms) + self.policy.cooldown_ms
        cooling = due & (ready_ms > now_ms) & ~live["queued"]
        held = (live["retry_ms"] > now_ms) & ~promoted
        go: Bool = due & ~cooling & ~held & ~live["queued"]
        at_latest_ms = np.where(due, np.minimum(headers["due_ms"], now_ms), headers["due_ms"])
        headers["due_ms"] = np.where(cooling, ready_ms, at_latest_ms)
        headers["last_encoded_ms"] = np.where(go, now_ms, headers["last_encoded_ms"])
        moved_up: Bool = due & promoted & live["queued"]
        live["queued"] |= go
        live["retry_ms"][go] = 0
        return go | moved_up

    def _stale_ms(self, headers: Columns, live: Columns) -> I64:
        """Return when the oldest unencoded action becomes too stale [U], earlier by the user's phase, so never late."""
        if not self.policy.max_staleness_ms:
            return np.full(len(headers), NEVER)
        stale: I64 = headers["first_unencoded_ms"] + (self.policy.max_staleness_ms - live["phase_ms"])
        return stale

    def _session_ms(self, live: Columns) -> I64:
        """Return when the session of the last action has ended [U], later by the user's phase, so never early."""
        if not self.policy.session_gap_ms:
            return np.full(len(live), NEVER)
        ended: I64 = live["last_applied_ms"] + (self.policy.session_gap_ms + live["phase_ms"])
        return ended
