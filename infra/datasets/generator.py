"""Generate a log of actions: users with drifting tastes act in sessions and bursts, and some events arrive late.

Policy and seed determine everything. A model can learn the tastes: within a session most items come from the user's
present category and often follow the item before, and a user's category changes from time to time, so an embedding that
contains the last actions predicts better than one of yesterday.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from encoder.arrays import I64

ACTION_NAMES = ("view", "click", "save", "share")
ACTION_WEIGHTS = (0.62, 0.25, 0.1, 0.03)
SURFACES = ("home", "search", "related")
EVENING_SWING = 0.5


@dataclass(frozen=True, slots=True)
class GeneratorPolicy:
    """Parameters of a log over `span_ms` of event time from `start_ms` on; events / span is the mean rate."""

    users: int = 2_000
    items: int = 3_000
    categories: int = 60
    events: int = 200_000
    start_ms: int = 1_700_000_000_000
    span_ms: int = 30 * 86_400_000
    session_events_mean: float = 8.0
    action_gap_ms: int = 20_000
    taste_spans: int = 10
    """Parts of the span; from one part to the next a user's category changes with probability `drift`."""
    drift: float = 0.35
    burst_fraction: float = 0.1
    """Share of the sessions that start in one of `bursts` windows, each a thousandth of the span."""
    bursts: int = 3
    late_fraction: float = 0.02
    late_ms_mean: int = 600_000


def generate(policy: GeneratorPolicy, seed: int) -> pa.Table:
    """Return `policy.events` rows in order of arrival.

    Columns: `user_id`, `item_id`, `action`, `timestamp_ms`, `surface`, `duration_ms`, `event_id`. A late event comes
    after events with a later `timestamp_ms`. The same policy and seed give the same table.
    """
    rng = np.random.default_rng(seed)
    lengths = _session_lengths(policy, rng)
    starts_ms = _session_starts_ms(policy, rng, len(lengths))
    users = _session_users(policy, rng, len(lengths))
    session = np.repeat(np.arange(len(lengths)), lengths)
    timestamp_ms = starts_ms[session] + _elapsed_in_session_ms(policy, rng, lengths)
    items = _items(policy, rng, lengths, _categories(policy, rng, users, starts_ms)[session])
    order = np.argsort(timestamp_ms + _delays_ms(policy, rng), kind="stable")
    count = policy.events
    columns = {
        "user_id": _named("user-", users[session][order]),
        "item_id": _named("item-", items[order]),
        "action": _chosen(rng, ACTION_NAMES, ACTION_WEIGHTS, count),
        "timestamp_ms": pa.array(timestamp_ms[order]),
        "surface": _chosen(rng, SURFACES, (0.5, 0.3, 0.2), count),
        "duration_ms": pa.array(rng.lognormal(8, 1, count).astype(np.int64)),
        "event_id": _named(f"{seed:x}-", np.arange(count)),
    }
    return pa.table(columns)


def _session_lengths(policy: GeneratorPolicy, rng: np.random.Generator) -> I64:
    """Return geometric lengths that sum to `events` exactly."""
    lengths = rng.geometric(1 / policy.session_events_mean, policy.events)
    ends = np.minimum(np.cumsum(lengths), policy.events)
    return np.diff(ends[: np.searchsorted(ends, policy.events) + 1], prepend=0)


def _session_starts_ms(policy: GeneratorPolicy, rng: np.random.Generator, sessions: int) -> I64:
    """Return starts that are uniform over the span with more in the evening, except for those in bursts."""
    phase = rng.random(sessions) * policy.span_ms
    day = 86_400_000 / (2 * np.pi)
    phase -= EVENING_SWING * day * np.sin(phase / day)
    in_burst = rng.random(sessions) < policy.burst_fraction
    burst_starts = rng.random(policy.bursts) * policy.span_ms * 0.999
    within = rng.random(sessions) * policy.span_ms / 1_000
    phase = np.where(in_burst, burst_starts[rng.integers(policy.bursts, size=sessions)] + within, phase)
    return policy.start_ms + np.clip(phase, 0, policy.span_ms - 1).astype(np.int64)


def _session_users(policy: GeneratorPolicy, rng: np.random.Generator, sessions: int) -> I64:
    """Return users of whom a few act often and most rarely: index = users x u^3, u uniform in [0, 1)."""
    return (policy.users * rng.random(sessions) ** 3).astype(np.int64)


def _elapsed_in_session_ms(policy: GeneratorPolicy, rng: np.random.Generator, lengths: I64) -> I64:
    gaps_ms = rng.exponential(policy.action_gap_ms, policy.events).astype(np.int64)
    firsts = np.cumsum(lengths) - lengths
    gaps_ms[firsts] = 0
    total_ms: I64 = np.cumsum(gaps_ms)
    elapsed_ms: I64 = total_ms - np.repeat(total_ms[firsts], lengths)
    return elapsed_ms


def _categories(policy: GeneratorPolicy, rng: np.random.Generator, users: I64, starts_ms: I64) -> I64:
    """Return the category of each session: its user's taste in that part of the span, a walk with random jumps."""
    drawn = rng.integers(policy.categories, size=(policy.taste_spans, policy.users))
    keeps = rng.random((policy.taste_spans, policy.users)) >= policy.drift
    tastes = drawn.copy()
    for part in range(1, policy.taste_spans):
        tastes[part] = np.where(keeps[part], tastes[part - 1], drawn[part])
    parts = (starts_ms - policy.start_ms) * policy.taste_spans // policy.span_ms
    return tastes[parts, users]


def _items(policy: GeneratorPolicy, rng: np.random.Generator, lengths: I64, categories: I64) -> I64:
    """Return items: a session walks through its category in small steps; one item in six is any, popular ones more."""
    per_category = policy.items // policy.categories
    steps = rng.choice([1, 2, 5], p=[0.7, 0.2, 0.1], size=policy.events)
    firsts = np.cumsum(lengths) - lengths
    steps[firsts] = (per_category * rng.random(len(lengths)) ** 2).astype(np.int64)
    walked = np.cumsum(steps)
    rank = walked - np.repeat(walked[firsts] - steps[firsts], lengths)
    anywhere = (policy.items * rng.random(policy.events) ** 2).astype(np.int64)
    wanders = rng.random(policy.events) < 1 / 6
    return np.where(wanders, anywhere, categories * per_category + rank % per_category)


def _delays_ms(policy: GeneratorPolicy, rng: np.random.Generator) -> I64:
    delays = rng.exponential(policy.late_ms_mean, policy.events)
    return np.where(rng.random(policy.events) < policy.late_fraction, delays, 0).astype(np.int64)


def _named(prefix: str, numbers: I64) -> pa.Array:
    return pa.array([f"{prefix}{number}" for number in numbers.tolist()])


def _chosen(rng: np.random.Generator, names: tuple[str, ...], weights: tuple[float, ...], count: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(rng.choice(len(names), p=weights, size=count), list(names)).cast("string")
