"""Compare the state of every user with the user's recomputed history, action by action.

The state keeps the last M actions of a user and counts all of them. Counts alone cannot prove anything: one lost and
one doubled event cancel. So the kept actions are compared byte for byte and in order; for older ones, which the state
no longer holds, only the count remains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from encoder.actions.columns import Actions
from encoder.arrays import I64, Bool
from infra.demo.histories import Histories
from streams.core.layout import StoredSequences


@dataclass(frozen=True, slots=True)
class Differences:
    """Differences between state and input, over all users."""

    lost: int = 0
    """Actions of the input that the state lacks."""
    duplicated: int = 0
    """Actions in the state more often than in the input."""
    misordered: int = 0
    """Users whose state has the right actions in the wrong order."""

    def __add__(self, other: Differences) -> Differences:
        return Differences(
            self.lost + other.lost, self.duplicated + other.duplicated, self.misordered + other.misordered
        )


def compare_contents(histories: Histories, actions: Actions, stored: StoredSequences, length_max: int) -> Differences:
    """Compare all users; `actions` [N] are the rows of `histories`, row i of `stored` is user i."""
    begin = np.maximum(histories.starts[:-1], histories.starts[1:] - length_max)  # [U] first action that is kept
    counts = stored.headers["count"].astype(np.int64)
    total = Differences()
    for user in np.flatnonzero(_may_differ(histories, actions, stored, begin, counts)).tolist():
        first, end = histories.starts[user], histories.starts[user + 1]
        history = _bytes_of(actions[histories.rows[first:end]])
        kept = _bytes_of(stored.actions[stored.starts[user] : stored.starts[user + 1]])
        total += compare_user(history, kept, int(counts[user]), length_max)
    return total


def _may_differ(histories: Histories, actions: Actions, stored: StoredSequences, begin: I64, counts: I64) -> Bool:
    """[U] Return whether count, length or any byte of the kept actions of a user differs."""
    lengths = histories.starts[1:] - begin
    differs: Bool = (counts != histories.counts) | (np.diff(stored.starts) != lengths)
    same = np.flatnonzero(~differs)
    # Actions of the users that are still equal, one user after another, on both sides: [K] each.
    owner = np.repeat(same, lengths[same])
    place = np.arange(len(owner)) - np.repeat(np.cumsum(lengths[same]) - lengths[same], lengths[same])
    expected = actions[histories.rows[begin[owner] + place]]
    found = stored.actions[stored.starts[owner] + place]
    differs[owner[expected != found]] = True
    return differs


def compare_user(history: Sequence[bytes], kept: Sequence[bytes], count: int, length_max: int) -> Differences:
    """Compare one user: the whole history, oldest first, with the kept actions and the count of the state.

    An action that is missing only because a doubled one has displaced it at the old end is not lost, and one that is
    kept only because a lost one has left room at the old end is not doubled. Since every action counts once,
    lost - duplicated = expected count - count.

    >>> compare_user([b"a", b"b", b"c"], [b"a", b"c", b"c"], 3, 8)
    Differences(lost=1, duplicated=1, misordered=0)
    >>> compare_user([b"a", b"b", b"c"], [b"c", b"c"], 4, 2)
    Differences(lost=0, duplicated=1, misordered=0)
    """
    expected = history[max(0, len(history) - length_max) :]
    extra = (Counter(kept) - Counter(history)).total()
    missing = list((Counter(expected) - Counter(kept)).elements())
    present = set(kept)
    oldest = next((place for place, action in enumerate(history) if action in present), len(history))
    missing_inside = sum(history.index(action) > oldest for action in missing)
    surplus = count - len(history)
    lost = max(0, missing_inside, extra - surplus, -surplus)
    duplicated = lost + surplus
    is_misordered = not (lost or duplicated) and list(kept) != list(expected)
    return Differences(lost, duplicated, int(is_misordered))


def _bytes_of(actions: Actions) -> list[bytes]:
    return [action.tobytes() for action in actions]
