"""Features as of any times of the past, by the code of the stream: batches of events and queries in, records out.

The input is a *timeline*: the rows of one user after another, each an event or a query, in order of time. A query comes
before the events of its time, because a value as of `t` covers the events before `t` only; so nothing that happened at
`t` or later can leak into it. Events of one time are in the order of their arrival.

    user     0  0  0  0  0  1  1
    time     5  7  7  9  9  3  8
    query       ?     ?        ?      from the event at 5; from those at 5 and 7; from the one at 3
    round    0  0  1  1  2  0  0

The events of a *round* are added for all users of a batch at once, then the queries of that round are answered. A batch
may end anywhere, also within a user.

Shapes: R rows of a batch, Q queries among them, U users.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from encoder.actions.columns import Actions
from encoder.arrays import F64, I64, Bool
from streams.core.columns import run_lengths, run_starts
from streams.core.features.definitions import FeatureSet
from streams.core.features.state import Attributes, FeatureRecords, FeatureState
from streams.core.features.structures import Functions

STATE_BYTES_MAX = 64 << 20
"""Memory of the states; a batch with more users than fit is divided."""
USERS_MAX = 4_096


@dataclass(frozen=True, slots=True)
class Timeline:
    """A batch of a timeline."""

    users: I64
    """[R] number of each row's user; all rows of a user are neighbours, also across batches."""
    actions: Actions
    """[R] actions; of a query only `timestamp_ms` is used, the time as of which it asks."""
    values: F64
    """[R] numbers of the actions, NaN where there is none."""
    is_query: Bool
    """[R] whether a row is a query."""

    def __len__(self) -> int:
        return len(self.users)

    def slice(self, low: int, high: int) -> Timeline:
        """Return some of the rows."""
        return Timeline(self.users[low:high], self.actions[low:high], self.values[low:high], self.is_query[low:high])


def compute(
    batches: Iterable[Timeline],
    feature_set: FeatureSet,
    attributes: Attributes,
    functions: Functions,
    state_bytes_max: int = STATE_BYTES_MAX,
) -> Iterator[FeatureRecords]:
    """Yield, per batch, the values [Q] of its queries in their order: those that the stream publishes."""
    states = _States(feature_set, attributes, functions, state_bytes_max)
    for batch in batches:
        answers = _Answers()
        starts = run_starts(batch.users)
        bounds = [*starts[:: states.rows].tolist(), len(batch)]
        for low, high in pairwise(bounds):
            states.advance(batch.slice(low, high), low, answers)
        yield answers.in_order()


class _Answers:
    """The answers of a batch, in the order in which they are found."""

    def __init__(self) -> None:
        self._values: list[bytes] = []
        self._estimated: list[tuple[str, ...]] = []
        self._until_ms: list[I64] = [np.zeros(0, np.int64)]
        self._rows: list[I64] = [np.zeros(0, np.int64)]

    def add(self, rows: I64, found: FeatureRecords) -> None:
        """Add the answers to the queries in these rows of the batch."""
        self._rows.append(rows)
        self._until_ms.append(found.valid_until_ms)
        self._values += found.values
        self._estimated += found.estimated

    def in_order(self) -> FeatureRecords:
        """Return the answers in the order of the rows."""
        order = np.argsort(np.concatenate(self._rows))
        places = order.tolist()
        return FeatureRecords(
            [self._values[place] for place in places],
            np.concatenate(self._until_ms)[order],
            [self._estimated[place] for place in places],
            [{}] * len(places),
        )


class _States:
    """The states of the users of a part of a batch, of which the last may go on in the next part."""

    def __init__(
        self, feature_set: FeatureSet, attributes: Attributes, functions: Functions, state_bytes_max: int
    ) -> None:
        self.rows = max(1, min(USERS_MAX, state_bytes_max // FeatureState.row_bytes(feature_set)))
        self._state = FeatureState(feature_set, attributes, self.rows, functions)
        self._last_user, self._last_row, self._last_key = -1, 0, 0

    def advance(self, part: Timeline, first_row: int, answers: _Answers) -> None:
        """Add the events and answer the queries of at most `rows` users."""
        starts = run_starts(part.users)
        lengths = run_lengths(starts, len(part))
        self._check_order(part, starts)
        state_rows = (self._last_row + np.arange(len(starts))) % self.rows  # [U]
        goes_on = part.users[0] == self._last_user
        self._state.clear(state_rows[1:] if goes_on else state_rows)
        self._last_user, self._last_row = int(part.users[-1]), int(state_rows[-1])
        self._last_key = _keys(part)[-1]
        row_of = np.repeat(state_rows, lengths)  # [R]
        rounds = _rounds(part, starts, lengths)  # [R]
        order = np.argsort(rounds, kind="stable")
        ends = np.cumsum(np.bincount(rounds)).tolist()
        for low, high in zip([0, *ends[:-1]], ends, strict=True):
            rows = order[low:high]
            is_query = part.is_query[rows]
            events, queries = rows[~is_query], rows[is_query]
            self._state.add(row_of[events], part.actions[events], part.values[events])
            if len(queries):
                as_of_ms = part.actions["timestamp_ms"][queries]
                answers.add(first_row + queries, self._state.records(row_of[queries], as_of_ms))

    def _check_order(self, part: Timeline, starts: I64) -> None:
        """Raise ValueError if a user's rows are not in order: later events would leak into the values."""
        keys = _keys(part)
        falls = np.zeros(len(part), np.bool_)
        falls[1:] = keys[1:] < keys[:-1]
        falls[starts] = False
        if falls.any() or (part.users[0] == self._last_user and keys[0] < self._last_key):
            raise ValueError("the rows of a user are not in order of time, queries before events")


def _keys(part: Timeline) -> I64:
    """Return numbers [R] that order the rows of a user."""
    keys: I64 = part.actions["timestamp_ms"] * 2 + ~part.is_query
    return keys


def _rounds(part: Timeline, starts: I64, lengths: I64) -> I64:
    """Return the round of each row [R]: how many times a query of its user was followed by an event before."""
    turns = np.zeros(len(part), np.int64)
    turns[1:] = part.is_query[:-1] & ~part.is_query[1:]
    turns[starts] = 0
    turned = np.cumsum(turns)
    rounds: I64 = turned - np.repeat(turned[starts], lengths)
    return rounds
