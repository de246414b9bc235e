"""The state of a partition: which users are handed over, which stay in memory, and how a job ends."""

from __future__ import annotations

import numpy as np
import pytest

from streams.core.jobs import merged
from streams.core.layout import StateLimits, StoredSequences, nothing_stored
from streams.core.partition_state import PartitionState
from streams.core.policy import Reason, TriggerPolicy
from tests.unit.core.build import LIMITS, batch, items_of, state_of

NOW_MS = 1_000_000


def _encode(state: PartitionState, users: list[bytes], now_ms: int = NOW_MS) -> None:
    job = state.begin_job(users)
    state.finish_job(job.sequences.users, job.offsets, now_ms)


def _clean(state: PartitionState) -> None:
    state.commit_checkpoint(state.begin_checkpoint())


def test_waiting_user_is_handed_over_once() -> None:
    """Further actions of a queued user do not hand it over again; it is encoded with all of them."""
    state = state_of(TriggerPolicy(), [b"a"])
    assert state.apply(batch([b"a", b"a"], [1, 2]), NOW_MS).due == [b"a"]
    assert state.apply(batch([b"a"], [3], offset=2), NOW_MS).due == []
    job = state.begin_job([b"a"])
    assert (job.sequences.actions["item"].tolist(), job.offsets.tolist()) == ([1, 2, 3], [2])
    assert job.newest_event_ms.tolist() == [3]


def test_action_during_encoding_hands_over_again() -> None:
    """An action that arrives while its user is being encoded is not covered by that embedding."""
    state = state_of(TriggerPolicy(), [b"a"])
    state.apply(batch([b"a"], [1]), NOW_MS)
    job = state.begin_job([b"a"])
    assert state.apply(batch([b"a"], [2], offset=1), NOW_MS).due == [b"a"]
    state.finish_job(job.sequences.users, job.offsets, NOW_MS)
    assert state.begin_job([b"a"]).offsets.tolist() == [1]


def test_unencoded_actions_are_counted_from_the_job() -> None:
    """Under every_n = 3, two actions during encoding do not fire, and the first one after it does."""
    state = state_of(TriggerPolicy(every_n=3), [b"a"])
    assert state.apply(batch([b"a"] * 3, [1, 2, 3]), NOW_MS).due == [b"a"]
    job = state.begin_job([b"a"])
    assert state.apply(batch([b"a"] * 2, [4, 5], offset=3), NOW_MS).due == []
    state.finish_job(job.sequences.users, job.offsets, NOW_MS)
    assert state.apply(batch([b"a"], [6], offset=5), NOW_MS).due == [b"a"]


def test_job_of_some_users() -> None:
    """A job can be reduced to some of its users, each with its own actions."""
    state = state_of(TriggerPolicy(), [b"a", b"b", b"c"])
    state.apply(batch([b"a", b"b", b"c", b"b"], [1, 2, 3, 4]), NOW_MS)
    job = state.begin_job([b"a", b"b", b"c"]).select(np.array([1, 2]))
    assert job.sequences.users == [b"b", b"c"]
    assert job.sequences.actions["item"].tolist() == [2, 4, 3]
    assert job.sequences.starts.tolist() == [0, 2, 3]
    assert (job.offsets.tolist(), job.sequences.counts.tolist()) == ([3, 2], [2, 1])


def test_revision_changes_at_anything_but_an_append() -> None:
    """Appends keep the revision; a late event and a tombstone each raise it, and it is never reset."""
    state = state_of(TriggerPolicy(), [b"a"])
    revisions = []
    for offset, (time_ms, dead) in enumerate([(10, False), (20, False), (15, False), (30, True), (40, False)]):
        state.apply(batch([b"a"], [time_ms], offset=offset, tombstones=[dead]), NOW_MS)
        revisions.append(int(state._sequences.headers["revision"][state._sequences.row_of[b"a"]]))
    assert revisions == [0, 0, 1, 2, 2]


def test_forgotten_user_is_published_as_a_tombstone_once() -> None:
    """A tombstone is an effect, also for an unknown user, unless the output topic already holds it."""
    state = state_of(TriggerPolicy(), [b"a"])
    state.load([b"b"], nothing_stored(1, LIMITS))
    state.seed_published([b"b"], np.array([7]))
    effects = state.apply(batch([b"a", b"b"], [5, 5], tombstones=[True, True]), NOW_MS)
    assert (effects.forgotten, effects.forgotten_offsets.tolist()) == ([b"a"], [0])


def test_embedding_of_a_forgotten_user_is_not_published() -> None:
    """A job that began before a tombstone does not bring the user back to the output topic."""
    state = state_of(TriggerPolicy(), [b"a", b"b"])
    state.apply(batch([b"a", b"b"], [1, 1]), NOW_MS)
    job = state.begin_job([b"a", b"b"])
    state.apply(batch([b"a", b"a"], [5, 6], offset=2, tombstones=[True, False]), NOW_MS)
    assert [job.sequences.users[row] for row in state.drop_outdated(job)] == [b"b"]


def test_replay_publishes_nothing_that_is_published() -> None:
    """Events up to a published source offset fire nothing; the first one beyond it does."""
    state = state_of(TriggerPolicy(), [b"a"])
    state.seed_published([b"a"], np.array([1]))
    assert state.apply(batch([b"a", b"a"], [1, 2]), NOW_MS).due == []
    assert state.apply(batch([b"a"], [3], offset=2), NOW_MS).due == [b"a"]


def test_firing_timers_loads_users_with_unseen_outputs() -> None:
    """The next timers request a cold user with unseen outputs; once it is loaded, its state contains them."""
    state = PartitionState(TriggerPolicy(), LIMITS)
    state.seed_published([b"a"], np.array([3]))
    assert state.has_unseen_outputs
    assert state.next_deadline_ms == 0
    assert state.fire_timers(NOW_MS).to_load == [b"a"]
    state.load([b"a"], nothing_stored(1, LIMITS))
    assert not state.has_unseen_outputs
    assert state.begin_checkpoint().headers["encoded_offset"].tolist() == [3]


def test_dirty_queued_and_encoding_users_are_not_evicted() -> None:
    """Only clean users that are neither queued nor in a job are evicted, and spared users stay."""
    users = [b"%d" % index for index in range(LIMITS.hot_users_max)]
    state = state_of(TriggerPolicy(), users)
    state.apply(batch(users[:3], [1, 1, 1]), NOW_MS)
    _clean(state)
    _encode(state, users[:1])
    state.begin_job(users[1:2])
    dirty, in_job, queued, in_hand = users[:4]
    assert state.missing([in_hand, b"new"]) == [b"new"]
    assert state.evict(LIMITS.hot_users_max, spare=[in_hand, b"new"]) == LIMITS.hot_users_max - 4
    assert state.missing([dirty, in_job, queued, in_hand]) == []


def test_users_of_an_open_snapshot_are_not_evicted() -> None:
    """Users of a snapshot stay in memory until the checkpoint ends, because nothing else has their state."""
    state = state_of(TriggerPolicy(every_n=100), [b"a"])
    state.apply(batch([b"a"], [1]), NOW_MS)
    snapshot = state.begin_checkpoint()
    assert state.evict(LIMITS.hot_users_max) == 0
    state.commit_checkpoint(snapshot)
    assert state.evict(LIMITS.hot_users_max) == 1


def test_evicts_those_untouched_for_longest() -> None:
    """The users whose last event is oldest are evicted first."""
    limits = StateLimits(sequence_length=8, chunk_length=2, hot_users_max=8)
    users = [b"%d" % index for index in range(8)]
    state = state_of(TriggerPolicy(every_n=100), users, limits)
    for offset, user in enumerate(users):
        state.apply(batch([user], [offset], offset=offset), NOW_MS)
    _clean(state)
    state.evict(2, spare=[b"x", b"y"])
    assert state.missing(users) == users[:2]


def test_deadline_of_an_evicted_user_requests_it() -> None:
    """A user with a pending timer may be evicted; when the timer is due, the user is requested."""
    state = state_of(TriggerPolicy(every_n=100, max_staleness_ms=1_000), [b"a"])
    state.apply(batch([b"a"], [1]), NOW_MS)
    snapshot = state.begin_checkpoint()
    state.commit_checkpoint(snapshot)
    assert state.evict(LIMITS.hot_users_max) == 1
    assert state.fire_timers(NOW_MS + 900).to_load == []
    assert state.fire_timers(NOW_MS + 1_000).to_load == [b"a"]


def test_failed_checkpoint_leaves_everything_dirty() -> None:
    """After `abort_checkpoint`, the next snapshot has the content of the failed one."""
    state = state_of(TriggerPolicy(), [b"a", b"b"])
    state.apply(batch([b"a"] * 5 + [b"b"], [1, 2, 3, 4, 5, 6]), NOW_MS)
    failed = state.begin_checkpoint()
    state.abort_checkpoint(failed)
    again = state.begin_checkpoint()
    assert list(again.users) == list(failed.users) == [b"a", b"b"]
    again.headers["flags"] = failed.headers["flags"]  # after a failure an index entry may or may not exist
    for column in ("headers", "tails", "chunk_numbers", "chunks"):
        assert getattr(again, column).tobytes() == getattr(failed, column).tobytes()
    state.commit_checkpoint(again)
    assert len(state.begin_checkpoint()) == 0


def test_shed_user_is_due_again_later() -> None:
    """A user shed from the queue is handed over again after the delay, for the same reason."""
    state = state_of(TriggerPolicy(), [b"a"])
    reason = state.apply(batch([b"a"], [1]), NOW_MS).reasons.tolist()
    state.requeue([b"a"], NOW_MS, 500)
    assert state.fire_timers(NOW_MS + 400).due == []
    effects = state.fire_timers(NOW_MS + 500)
    assert (effects.due, effects.reasons.tolist()) == ([b"a"], reason)


def test_failed_job_is_due_again_later() -> None:
    """A user whose job failed is handed over again after the delay."""
    state = state_of(TriggerPolicy(), [b"a"])
    state.apply(batch([b"a"], [1]), NOW_MS)
    state.retry_job(state.begin_job([b"a"]), NOW_MS, 500)
    assert state.fire_timers(NOW_MS + 400).due == []
    assert state.fire_timers(NOW_MS + 500).due == [b"a"]


def test_event_of_a_user_not_loaded_is_an_error() -> None:
    """A batch with a user that is not in memory is not applied at all: that is a defect of the caller."""
    state = state_of(TriggerPolicy(), [b"a"])
    with pytest.raises(KeyError):
        state.apply(batch([b"a", b"x"], [1, 1]), NOW_MS)
    assert items_of(state, b"a") == []


def test_a_waiting_user_is_handed_over_again_for_a_more_valuable_reason_only() -> None:
    """A queued user that makes a strong action is handed over again, once; further plain and strong actions are not."""
    state = state_of(TriggerPolicy(strong=frozenset({"buy"}), cooldown_ms=5_000), [b"a"])
    assert state.apply(batch([b"a"], [1]), NOW_MS).reasons.tolist() == [Reason.EVERY_N]
    assert state.apply(batch([b"a"], [2], offset=1), NOW_MS).due == []
    promoted = state.apply(batch([b"a"], [3], offset=2, actions=["buy"]), NOW_MS)
    assert (promoted.due, promoted.reasons.tolist(), promoted.priorities.tolist()) == ([b"a"], [Reason.STRONG], [5])
    assert state.apply(batch([b"a"], [4], offset=3, actions=["buy"]), NOW_MS).due == []
    assert state.begin_job([b"a"]).offsets.tolist() == [3]
    assert state.begin_job([b"a"]).sequences.users == [b"a"]  # still due, but no longer queued


def test_a_shed_user_is_promoted_by_a_strong_action_and_by_its_staleness_bound() -> None:
    """A shed user waits for its delay, except after a strong action; past its staleness bound it has that priority."""
    policy = TriggerPolicy(strong=frozenset({"buy"}), max_staleness_ms=3_000)
    state = state_of(policy, [b"a", b"b"])
    state.apply(batch([b"a", b"b"], [1, 1]), NOW_MS)
    state.requeue([b"a", b"b"], NOW_MS, 5_000)
    assert state.apply(batch([b"a", b"b"], [2, 2], offset=2, actions=["see", "buy"]), NOW_MS).due == [b"b"]
    late = state.fire_timers(NOW_MS + 5_000)
    assert (late.due, late.reasons.tolist()) == ([b"a"], [Reason.MAX_STALENESS])


@pytest.mark.parametrize("cooldown_ms", [0, 60_000])
def test_users_that_are_shed_again_and_again_cost_no_byte(cooldown_ms: int) -> None:
    """A user shed or failed a hundred times is written once; a restart from what was written still finds it due."""
    state = state_of(TriggerPolicy(cooldown_ms=cooldown_ms), [b"a", b"b"])
    state.apply(batch([b"a", b"b"], [1, 1]), NOW_MS)
    snapshot = state.begin_checkpoint()
    assert len(snapshot) == 2
    state.commit_checkpoint(snapshot)
    now_ms = NOW_MS
    for _ in range(100):
        state.requeue([b"a"], now_ms, 1_000)
        state.retry_job(state.begin_job([b"b"]), now_ms, 1_000)
        assert not state.is_dirty
        now_ms += 1_000
        assert state.fire_timers(now_ms - 1).due == []
        assert state.fire_timers(now_ms + 100).due == [b"a", b"b"]
        assert len(state.begin_checkpoint()) == 0
    restarted = PartitionState(TriggerPolicy(cooldown_ms=cooldown_ms), LIMITS)
    restarted.load([b"a"], StoredSequences(snapshot.headers[:1], snapshot.tails[:1], np.array([0, 1])))
    assert restarted.fire_timers(NOW_MS + cooldown_ms + 100).due == [b"a"]


def test_the_wheel_is_bounded_by_users_that_are_loaded_and_evicted_all_the_time() -> None:
    """Under a session gap of a day, 50 rounds in which every user is loaded, acts and is evicted leave two per user."""
    state, users = PartitionState(TriggerPolicy(every_n=0, session_gap_ms=86_400_000), LIMITS), 96
    offset = 0
    for round_ in range(50):
        for begin in range(0, users, LIMITS.hot_users_max):
            names = [b"%d" % user for user in range(begin, begin + LIMITS.hot_users_max)]
            state.evict(LIMITS.hot_users_max)
            state.load(names, nothing_stored(len(names), LIMITS))
            state.apply(batch(names, [round_ * 1_000] * len(names), offset=offset), NOW_MS + round_ * 60_000)
            _clean(state)
            offset += len(names)
    assert state.deadline_entries <= users + LIMITS.hot_users_max


def test_the_arrival_of_a_user_read_from_disk_is_unknown() -> None:
    """A user that is due and comes back into memory has no arrival time until its next event, which then has one."""
    state = state_of(TriggerPolicy(), [b"a"])
    state.apply(batch([b"a"], [1], arrival_ms=[50]), NOW_MS)
    snapshot = state.begin_checkpoint()
    restarted = PartitionState(TriggerPolicy(), LIMITS)
    restarted.load([b"a"], StoredSequences(snapshot.headers[:1], snapshot.tails[:1], np.array([0, 1])))
    assert restarted.fire_timers(NOW_MS + 100).due == [b"a"]
    job = restarted.begin_job([b"a"])
    assert job.arrival_ms[0] < 0
    restarted.retry_job(job, NOW_MS, 0)
    restarted.apply(batch([b"a"], [2], offset=1, arrival_ms=[70]), NOW_MS)
    assert merged([restarted.begin_job([b"a"]), state.begin_job([b"a"])]).arrival_ms.tolist() == [70, 50]


def test_a_failed_job_leaves_a_later_one_of_the_same_user_alone() -> None:
    """A user whose later job is under way is not due again because an earlier one failed."""
    state = state_of(TriggerPolicy(), [b"a"])
    jobs = []
    for offset in (0, 1):
        state.apply(batch([b"a"], [1 + offset], offset=offset), NOW_MS)
        jobs.append(state.begin_job([b"a"]))
    state.retry_job(jobs[0], NOW_MS, 0)
    assert state.fire_timers(NOW_MS + 1_000).due == []
    state.retry_job(jobs[1], NOW_MS, 0)
    assert state.fire_timers(NOW_MS + 1_000).due == [b"a"]
