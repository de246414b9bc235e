"""The sequences: the vectorised path against the path event by event, and the special cases of each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.actions.columns import ActionBatch
from streams.core.layout import nothing_stored
from streams.core.merge import Outcome
from streams.core.sequences import SequenceState, StateFull
from tests.unit.core.build import LIMITS, batch

USERS = [b"a", b"b", b"c"]
EVENT = st.tuples(
    st.sampled_from(USERS),
    st.one_of(st.integers(0, 40), st.just(20)),
    st.sampled_from([0, 0, 0, 1, 2, 3, 0x10001]),
    st.sampled_from([False] * 12 + [True]),
)


def _fresh() -> SequenceState:
    state = SequenceState(LIMITS)
    state.load(USERS, nothing_stored(len(USERS), LIMITS), np.zeros(len(USERS), np.int64))
    return state


def _apply(state: SequenceState, events: list[tuple[bytes, int, int, bool]], cuts: list[int]) -> list[int]:
    """Apply events in batches that end at `cuts`; return their outcomes."""
    outcomes: list[int] = []
    for begin, end in zip([0, *cuts], [*cuts, len(events)], strict=True):
        part = events[begin:end]
        if part:
            users, times, ids, tombstones = map(list, zip(*part, strict=True))
            applied = state.apply(batch(users, times, offset=begin, event_ids=ids, tombstones=tombstones))
            outcomes += applied.outcomes.tolist()
    return outcomes


def _contents(state: SequenceState) -> list[object]:
    rows = state.rows_of(USERS)
    actions, starts = state.kept(rows)
    headers = state.headers[rows]
    names = ("count", "applied_offset", "forgotten_ms", "revision")
    return [actions.tolist(), starts.tolist(), [headers[name].tolist() for name in names]]


@settings(max_examples=400)
@given(
    events=st.lists(EVENT, max_size=60),
    rising=st.booleans(),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_batches_give_what_single_events_give(
    events: list[tuple[bytes, int, int, bool]], rising: bool, cuts: list[int]
) -> None:
    """Sequences, revisions and outcomes do not depend on how events are divided into batches."""
    if rising:
        events = [(user, index // 2, id_, dead) for index, (user, _, id_, dead) in enumerate(events)]
    cuts = sorted(min(cut, len(events)) for cut in cuts)
    batched, single = _fresh(), _fresh()
    outcomes = _apply(batched, events, cuts)
    assert outcomes == _apply(single, events, list(range(1, len(events))))
    assert _contents(batched) == _contents(single)


@settings(max_examples=200)
@given(events=st.lists(EVENT, max_size=60))
def test_slow_path_gives_what_the_fast_path_gives(events: list[tuple[bytes, int, int, bool]]) -> None:
    """Events applied one by one yield the same sequences as the vectorised path."""
    fast, slow = _fresh(), _fresh()

    def judge_all_slow(
        batch: ActionBatch, rows: object, outcomes: object
    ) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return np.ones(len(batch), np.bool_)

    slow._judge = judge_all_slow  # type: ignore[method-assign]
    assert _apply(fast, events, []) == _apply(slow, events, [])
    assert _contents(fast) == _contents(slow)


def test_batch_with_more_events_of_a_user_than_are_kept() -> None:
    """After a batch with 3 M events of one user, the newest M are kept and all are counted."""
    state, length = _fresh(), LIMITS.sequence_length
    state.apply(batch([b"a"] * 3 * length, range(3 * length)))
    actions, _ = state.kept(state.rows_of([b"a"]))
    assert actions["item"].tolist() == list(range(2 * length + 1, 3 * length + 1))
    assert state.headers["count"][state.rows_of([b"a"])] == 3 * length


def test_id_of_an_action_that_leaves_during_the_batch_is_free() -> None:
    """An event id can be used again once its action is no longer kept, even if that happens within a batch."""
    state, length = _fresh(), LIMITS.sequence_length
    state.apply(batch([b"a"], [0], event_ids=[7]))
    later = batch([b"a"] * (length + 1), range(1, length + 2), offset=1, event_ids=[0] * length + [7])
    assert state.apply(later).outcomes.tolist() == [Outcome.APPLIED] * (length + 1)
    again = batch([b"a"], [length + 2], offset=length + 2, event_ids=[7])
    assert state.apply(again).outcomes.tolist() == [Outcome.DUPLICATE]


def test_each_outcome_is_reported() -> None:
    """Late, duplicate (by id or offset), too old, tombstone and forgotten events each have their own outcome."""
    state, length = _fresh(), LIMITS.sequence_length
    state.apply(batch([b"a"] * length, range(100, 100 + length), event_ids=range(1, length + 1)))
    events = batch(
        [b"a", b"a", b"a", b"b", b"b"],
        [103, 104, 50, 200, 150],
        offset=length,
        event_ids=[0, 5, 0, 0, 0],
        tombstones=[False, False, False, True, False],
    )
    expected = [Outcome.LATE, Outcome.DUPLICATE, Outcome.TOO_OLD, Outcome.TOMBSTONE, Outcome.FORGOTTEN]
    assert state.apply(events).outcomes.tolist() == expected
    again = state.apply(events).outcomes.tolist()
    assert again == [Outcome.DUPLICATE, Outcome.DUPLICATE, Outcome.TOO_OLD, Outcome.DUPLICATE, Outcome.FORGOTTEN]


def test_nothing_of_a_forgotten_user_stays_in_memory() -> None:
    """After a tombstone, the user's ring and fingerprints are all zero."""
    state = _fresh()
    state.apply(batch([b"a"] * 5, range(5), event_ids=range(1, 6)))
    state.apply(batch([b"a"], [9], offset=5, tombstones=[True]))
    row, length = int(state.rows_of([b"a"])[0]), LIMITS.sequence_length
    assert not state._ring[row * length : (row + 1) * length].view(np.uint8).any()
    assert not state._fingerprints[row].any()


def test_no_more_users_than_the_limit() -> None:
    """Loading beyond the limit is rejected with a text that states the remedy."""
    state = SequenceState(LIMITS)
    users = [str(user).encode() for user in range(LIMITS.hot_users_max + 1)]
    with pytest.raises(StateFull, match="checkpoint and evict first"):
        state.load(users, nothing_stored(len(users), LIMITS), np.zeros(len(users), np.int64))
