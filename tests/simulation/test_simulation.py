"""The invariants of the design under histories with faults, with an independent model beside the real code."""

from __future__ import annotations

from random import Random, SystemRandom

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.harness.simulation import history as h
from infra.harness.simulation.schedule import STEPS, as_source, failure, histories, shortest
from infra.harness.simulation.simulation import run_history
from streams.core.policy import Reason, TriggerPolicy


def _check(seed: int, runs: int) -> None:
    for run, history in enumerate(histories(seed, runs)):
        error = failure(history)
        if error is not None:
            pytest.fail(f"seed {seed}, history {run}: {error}\n{as_source(shortest(history))}")


def test_known_seed_violates_nothing() -> None:
    """A hundred histories, the same in every run, violate no invariant."""
    _check(seed=2024, runs=100)


def test_fresh_seed_violates_nothing() -> None:
    """A hundred histories, new in every run, violate no invariant; the seed is printed."""
    seed = SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    _check(seed, runs=100)


def test_same_seed_gives_same_event_log() -> None:
    """A seed and a commit reproduce a whole history."""
    first = [run_history(history) for history in histories(7, 3)]
    assert first == [run_history(history) for history in histories(7, 3)]
    assert len({tuple(log) for log in first}) == 3


USERS = st.integers(0, h.USERS - 1)
COUNTS = st.sampled_from([1, 2, 5, 30])
STEP = st.one_of(
    st.builds(h.Act, USERS, st.booleans()),
    st.builds(h.Late, USERS, st.sampled_from([0, 5, 40, 300, 5_000])),
    st.builds(h.Duplicate, st.integers(1, 12)),
    st.builds(h.Tombstone, USERS),
    st.builds(h.Poison, st.integers(0, h.POISONS - 1)),
    st.builds(h.InTransaction, USERS),
    st.builds(h.EndTransactions, st.booleans()),
    st.builds(h.Poll, COUNTS),
    st.builds(h.LostFetch, COUNTS),
    st.builds(h.Redeliver, st.integers(0, 1), COUNTS),
    st.builds(h.Silence, st.sampled_from([1, 150, 4_000])),
    st.builds(h.ClockJump, st.sampled_from([-3_000, 100, 3_000])),
    st.builds(h.Encode, COUNTS),
    st.builds(h.EncoderFails, st.integers(1, 3)),
    st.builds(h.BadUser, USERS, st.booleans()),
    st.builds(h.Deliver, COUNTS),
    st.builds(h.Acknowledge),
    st.builds(h.Refuse, st.integers(0, h.REFUSALS - 1)),
    st.builds(h.Checkpoint),
    st.builds(h.Commit, COUNTS),
    st.builds(h.FailCheckpoint, st.integers(0, h.REFUSALS - 2)),
    st.builds(h.DiskFull, st.integers(1, 3)),
    st.builds(h.TornCheckpoint, st.integers(0, 12), st.integers(0, 4)),
    st.builds(h.Crash, st.integers(0, 4)),
    st.builds(h.TornRestore, st.integers(0, 3)),
    st.builds(h.Rebalance, st.booleans(), st.booleans()),
    st.builds(h.Reassign, st.sampled_from([0, 5])),
    st.builds(h.Wake),
    st.builds(h.Compaction, st.booleans()),
    st.builds(h.NewRelease),
    st.builds(h.ForeignSource),
    st.builds(h.LostChangelog),
)


@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
@given(seed=st.integers(0, 2**32), partitions=st.integers(1, 2), steps=st.lists(STEP, max_size=STEPS))
def test_generated_histories_violate_nothing(seed: int, partitions: int, steps: list[h.Step]) -> None:
    """No sequence of steps under any policy violates an invariant, with features or without."""
    features, refresh_ms = seed % 2 == 0, 500 * (seed % 3)
    policy = h.random_policy(Random(seed))
    run_history(h.History(policy, tuple(steps), partitions, features=features, refresh_ms=refresh_ms))


EVERY_ACTION = TriggerPolicy()
SESSIONS = TriggerPolicy(every_n=3, first_n=2, session_gap_ms=1_500, cooldown_ms=300)
ALL = 30
"""More than there is of anything."""

REGRESSIONS: dict[str, tuple[TriggerPolicy, list[h.Step]]] = {
    "a batch evicts none of its own users": (
        EVERY_ACTION,
        [
            *(h.Act(3), h.Act(2), h.Act(4), h.Late(5, 0), h.Poll(4), h.Encode(ALL), h.Deliver(ALL), h.Acknowledge()),
            *(h.Checkpoint(), h.Commit(ALL), h.Act(0), h.Act(3), h.Act(1), h.Poll(ALL)),
        ],
    ),
    "a user forgotten while it waits in the queue stays due for what follows": (
        EVERY_ACTION,
        [
            *(h.Act(3), h.Poll(1), h.Late(5, 5), h.Poll(2), h.Tombstone(5), h.Act(4), h.Checkpoint(), h.Commit(ALL)),
            *(h.Act(5), h.Poll(5), h.Rebalance(True, True)),
        ],
    ),
    "a deadline set while a forgotten user is in a job is kept": (
        SESSIONS,
        [
            *(h.Act(0), h.Poll(ALL), h.Checkpoint(), h.Commit(ALL), h.Tombstone(0), h.Silence(1_000), h.Crash()),
            *(h.Act(0), h.Poll(ALL), h.Encode(ALL)),
        ],
    ),
    "a deadline set while a forgotten user waits in the queue is kept": (
        TriggerPolicy(every_n=3, session_gap_ms=1_500),
        [h.Act(5), h.Poll(1), h.Silence(4_000), h.Tombstone(5), h.Act(2), h.Act(5), h.Poll(ALL), h.Encode(ALL)],
    ),
    "a mark does not pass unseen outputs": (
        EVERY_ACTION,
        [
            *(h.Act(5), h.Poll(1), h.Checkpoint(), h.Commit(ALL), h.Encode(1), h.Deliver(1), h.TornCheckpoint(2)),
            *(h.Checkpoint(), h.Commit(ALL), h.Crash()),
        ],
    ),
    "users that a timer made due leave memory before cold users are loaded": (
        TriggerPolicy(strong=frozenset({"buy"}), first_n=2, max_staleness_ms=2_000, cooldown_ms=300, spread_ms=400),
        [
            *(h.Act(1), h.Late(0, 5_000), h.Act(1), h.Late(2, 5_000), h.Act(2), h.Act(3), h.Act(3, True), h.Poll(1)),
            *(h.Tombstone(1), h.Poison(3), h.Late(5, 0), h.Poll(1), h.Checkpoint(), h.Rebalance(True, False)),
            *(h.Act(4), h.Poll(1), h.Poll(5), h.Late(4, 40), h.Act(2, True), h.Act(1), h.Act(4), h.Poll(ALL)),
            *(h.Act(3), h.Poll(1), h.ClockJump(3_000)),
        ],
    ),
    "an acknowledgement arrives after a later job of a forgotten user ended and the user was evicted": (
        TriggerPolicy(strong=frozenset({"buy"}), first_n=2, max_staleness_ms=2_000, spread_ms=400),
        [
            *(h.Act(4), h.Act(1), h.Poll(5), h.Encode(ALL), h.Late(4, 300), h.Act(2), h.Tombstone(4), h.Poll(2)),
            *(h.Encode(ALL), h.Poll(5), h.Act(3, True), h.Late(0, 300), h.Deliver(1), h.Acknowledge(), h.Poll(5)),
        ],
    ),
    "an embedding that was being encoded when the state was read again is not published beside the new one": (
        EVERY_ACTION,
        [
            *(h.Act(5), h.Poll(ALL), h.DiskFull(1), h.Checkpoint(), h.Commit(ALL), h.Silence(1_000), h.Encode(1)),
            *(h.Poll(ALL), h.Encode(ALL), h.Deliver(ALL), h.Acknowledge()),
        ],
    ),
    "the tombstone of a user forgotten while the partition is given back is published": (
        TriggerPolicy(strong=frozenset({"buy"}), session_gap_ms=3_000, spread_ms=400),
        [
            *(h.Tombstone(5), h.Poll(5), h.Late(7, 40), h.Refuse(3), h.Poll(2), h.Tombstone(4), h.Act(6)),
            *(h.Tombstone(0), h.Act(2), h.Tombstone(1), h.Poll(5), h.Reassign(5)),
        ],
    ),
    "a failed job does not end a later one of the same user": (
        EVERY_ACTION,
        [
            *(h.Late(3, 5), h.Poll(ALL), h.Act(3), h.Encode(1), h.Poll(2), h.Encode(3), h.Refuse(3)),
            *(h.Silence(1_000), h.Encode(ALL), h.Deliver(ALL), h.Acknowledge()),
        ],
    ),
    "what is in flight when the state is read again counts as published": (
        EVERY_ACTION,
        [
            *(h.Act(5), h.Poll(ALL), h.Encode(ALL), h.DiskFull(1), h.Checkpoint(), h.Commit(ALL), h.Silence(1_000)),
            *(h.Deliver(ALL), h.Acknowledge(), h.Silence(1_000), h.Poll(ALL), h.Encode(ALL)),
        ],
    ),
}


SENT = (h.Deliver(ALL), h.Acknowledge(), h.Silence(1))
PUBLISHED = (h.Poll(1), *SENT, h.Encode(ALL), *SENT, *SENT)
STORED = (h.Checkpoint(), h.Commit(ALL), h.Commit(ALL))
WITH_FEATURES: dict[str, list[h.Step]] = {
    "a refresh that no checkpoint has stored is planned again": [h.Act(0), *PUBLISHED, h.Crash()],
    "nothing is refreshed before the replay has reached what is published": [
        *(h.Act(0), *PUBLISHED, *STORED, h.Act(0), *PUBLISHED, h.Crash(), h.Silence(4_000), *SENT, h.Silence(4_000)),
    ],
    "nor before it has reached features whose embedding is not published": [
        *(h.Act(0), *PUBLISHED, *STORED, h.Act(0), h.Poll(1), *SENT, h.Crash(), h.Silence(4_000), *SENT),
    ],
    "nor by a worker that is restored in the middle of the replay": [
        *(
            h.Tombstone(1),
            h.Poll(1),
            *SENT,
            *STORED,
            h.Act(2),
            h.Act(2),
            h.Act(2),
            h.Act(1),
            h.Tombstone(1),
            h.Poll(ALL),
        ),
        *(h.Poll(ALL), *SENT, *SENT, h.Crash(), h.Poll(4), *STORED, *STORED, h.Crash(), h.Silence(4_000), *SENT),
    ],
    "a user who is forgotten while features are on their way is not refreshed": [
        *(h.Act(0), h.Poll(1), h.Tombstone(0), h.Poll(1), *SENT, *SENT, h.Silence(4_000), h.Silence(4_000)),
    ],
    "a user who is replayed and forgotten in one batch is not refreshed": [
        *(h.Act(0), h.Tombstone(0), h.Poll(ALL), *SENT, h.Crash(), h.Poll(ALL), h.Silence(4_000), h.Silence(4_000)),
    ],
}


@pytest.mark.parametrize("partitions", [1, 2])
@pytest.mark.parametrize("name", WITH_FEATURES)
def test_regression_with_features(name: str, partitions: int) -> None:
    """A history of features that once violated an invariant no longer does."""
    run_history(h.History(EVERY_ACTION, tuple(WITH_FEATURES[name]), partitions, features=True, refresh_ms=200))


@pytest.mark.parametrize("partitions", [1, 2])
@pytest.mark.parametrize("name", REGRESSIONS)
def test_regression(name: str, partitions: int) -> None:
    """A history that once violated an invariant no longer does."""
    policy, steps = REGRESSIONS[name]
    run_history(h.History(policy, tuple(steps), partitions))


def test_a_worker_that_is_frozen_while_it_replaces_its_producer_does_not_fence_its_successor() -> None:
    """The group is asked whether it is a member after the old producer has stopped, which may take seconds."""
    steps = [
        *(h.Act(0, True), h.Act(5, True), h.Act(7, True), h.Poll(ALL), h.TornCheckpoint(5), h.Silence(4_000)),
        *(h.TornCheckpoint(0), h.Silence(50), h.Checkpoint(), h.Act(3), h.Act(4, True), h.Silence(50_000)),
        *(h.Poll(5), h.Rebalance(False, True)),
    ]
    run_history(h.History(EVERY_ACTION, tuple(steps), 1, features=True, refresh_ms=1_500))


def test_a_user_whose_expiry_a_crash_has_undone_is_not_refreshed() -> None:
    """Its tombstone is in a topic, and no event will bring it back: nothing older may follow it."""
    steps = [
        *(h.Late(0, 300), h.Silence(4_000), h.Late(1, 40), h.Act(3), h.Act(4), h.Poll(ALL), h.Act(6), h.Poll(2)),
        *(h.Commit(ALL), h.Silence(50_000), h.Deliver(2), h.Crash(), h.Poll(1)),
    ]
    policy = TriggerPolicy(every_n=0, session_gap_ms=3_000, spread_ms=400)
    run_history(h.History(policy, tuple(steps), 2, 100, features=True, refresh_ms=1_500, user_ttl_ms=15_000))


def test_every_reason_is_met() -> None:
    """The random policies use every trigger, so none of the checks is vacuous."""
    policies = [h.random_policy(Random(seed)) for seed in range(50)]
    assert {policy.every_n for policy in policies} >= {0, 1, 3}
    assert all(any(getattr(p, key) for p in policies) for key in ("strong", "first_n", "max_staleness_ms"))
    assert all(any(getattr(p, key) for p in policies) for key in ("session_gap_ms", "cooldown_ms", "spread_ms"))
    assert {policy.priorities[0] for policy in policies} == set(Reason)
