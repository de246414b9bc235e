"""Each trigger in its simplest situation."""

from __future__ import annotations

from streams.core.partition_state import PartitionState
from streams.core.policy import Reason, TriggerPolicy
from tests.unit.core.build import batch, state_of

NOW_MS = 1_000_000


def _reasons(state: PartitionState, times: int, offset: int, now_ms: int, action: str = "see") -> list[int]:
    """Return the reasons for which user `a` is handed over while it acts `times` times, one batch each."""
    reasons: list[int] = []
    for index in range(offset, offset + times):
        effects = state.apply(batch([b"a"], [index], offset=index, actions=[action]), now_ms)
        reasons += effects.reasons.tolist()
        if effects.due:
            _encode(state, now_ms)
    return reasons


def _encode(state: PartitionState, now_ms: int) -> None:
    job = state.begin_job([b"a"])
    state.finish_job(job.sequences.users, job.offsets, now_ms)


def _fire_timers(state: PartitionState, now_ms: int) -> list[int]:
    reasons: list[int] = state.fire_timers(now_ms).reasons.tolist()
    return reasons


def test_default_policy_encodes_every_action() -> None:
    """Under the default policy each action hands its user over."""
    assert _reasons(state_of(TriggerPolicy(), [b"a"]), 4, 0, NOW_MS) == [Reason.EVERY_N] * 4


def test_every_n_counts_unencoded_actions() -> None:
    """Under every_n = 3 the third unencoded action fires, and the count restarts."""
    state = state_of(TriggerPolicy(every_n=3), [b"a"])
    assert [len(_reasons(state, 1, offset, NOW_MS)) for offset in range(7)] == [0, 0, 1, 0, 0, 1, 0]


def test_strong_action_fires_at_once() -> None:
    """A strong action fires regardless of every_n; others do not."""
    state = state_of(TriggerPolicy(every_n=100, strong=frozenset({"buy"})), [b"a"])
    assert _reasons(state, 2, 0, NOW_MS) == []
    assert _reasons(state, 1, 2, NOW_MS, "buy") == [Reason.STRONG]


def test_first_actions_of_a_new_user_fire() -> None:
    """Under first_n = 2 the first two actions fire, the third does not."""
    state = state_of(TriggerPolicy(every_n=100, first_n=2), [b"a"])
    assert _reasons(state, 3, 0, NOW_MS) == [Reason.FIRST_N] * 2


def test_staleness_fires_with_no_further_event() -> None:
    """An unencoded action fires after max_staleness_ms, within one bucket, without another event."""
    state = state_of(TriggerPolicy(every_n=100, max_staleness_ms=5_000), [b"a"])
    assert _reasons(state, 1, 0, NOW_MS) == []
    _reasons(state, 1, 1, NOW_MS + 3_000)
    assert _fire_timers(state, NOW_MS + 4_900) == []
    assert _fire_timers(state, NOW_MS + 5_000) == [Reason.MAX_STALENESS]
    _encode(state, NOW_MS + 5_000)
    assert _fire_timers(state, NOW_MS + 60_000) == []


def test_session_end_fires_after_the_gap() -> None:
    """Each action postpones the end of the session, which fires once, session_gap_ms after the last action."""
    state = state_of(TriggerPolicy(every_n=100, session_gap_ms=5_000), [b"a"])
    _reasons(state, 1, 0, NOW_MS)
    _reasons(state, 1, 1, NOW_MS + 4_000)
    assert _fire_timers(state, NOW_MS + 5_100) == []
    assert _fire_timers(state, NOW_MS + 9_000) == [Reason.SESSION_END]
    _encode(state, NOW_MS + 9_000)
    assert _fire_timers(state, NOW_MS + 60_000) == []


def test_cooldown_turns_a_trigger_into_a_deadline() -> None:
    """A trigger within the cooldown fires at its end, for its own reason."""
    state = state_of(TriggerPolicy(cooldown_ms=1_000), [b"a"])
    assert _reasons(state, 1, 0, NOW_MS) == [Reason.EVERY_N]
    assert _reasons(state, 2, 1, NOW_MS + 200) == []
    assert _fire_timers(state, NOW_MS + 900) == []
    assert _fire_timers(state, NOW_MS + 1_000) == [Reason.EVERY_N]


def test_user_keeps_the_more_valuable_reason() -> None:
    """A user due for two reasons is handed over for the one that comes first in `priorities`."""
    strong = frozenset({"buy"})
    state = state_of(TriggerPolicy(strong=strong), [b"a", b"b"])
    effects = state.apply(batch([b"a", b"b"], [1, 1], actions=["buy", "see"]), NOW_MS)
    assert dict(zip(effects.due, effects.reasons.tolist(), strict=True)) == {b"a": Reason.STRONG, b"b": Reason.EVERY_N}
    assert dict(zip(effects.due, effects.priorities.tolist(), strict=True)) == {b"a": 5, b"b": 1}
    turned = TriggerPolicy(strong=strong, priorities=tuple(reversed(TriggerPolicy().priorities)))
    effects = state_of(turned, [b"a"]).apply(batch([b"a"], [1], actions=["buy"]), NOW_MS)
    assert effects.reasons.tolist() == [Reason.EVERY_N]


def test_phase_spreads_deadlines_within_the_bound() -> None:
    """Users that act at the same instant fall due spread over spread_ms, each before its staleness bound."""
    users = [b"%d" % index for index in range(32)]
    state = state_of(TriggerPolicy(every_n=100, max_staleness_ms=5_000, spread_ms=2_000), users)
    state.apply(batch(users, [1] * len(users)), NOW_MS)
    due = [len(state.fire_timers(NOW_MS + ms).due) for ms in range(2_900, 5_001, 100)]
    assert sum(due) == len(users)
    assert sum(count > 0 for count in due) > 10


def test_times_of_the_future_put_nothing_off() -> None:
    """Cooldown, staleness and session end go by the clock alone, however far ahead or behind the event times are."""
    policy = TriggerPolicy(every_n=3, cooldown_ms=1_000, max_staleness_ms=5_000, session_gap_ms=2_000)
    fired = []
    for ahead_ms in (0, 300_000, 10**12, -300_000):
        state, log = state_of(policy, [b"a"]), []
        for offset in range(4):
            effects = state.apply(batch([b"a"], [NOW_MS + ahead_ms + offset], offset=offset), NOW_MS + 100 * offset)
            log.append((offset, effects.reasons.tolist()))
            if effects.due:
                _encode(state, NOW_MS)
        log += [(ms, _fire_timers(state, NOW_MS + ms)) for ms in range(400, 6_000, 100)]
        fired.append([each for each in log if each[1]])
    assert fired[0]
    assert fired == [fired[0]] * 4
