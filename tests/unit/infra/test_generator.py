"""Policy and seed determine the generated actions, which have sessions, bursts, drift and late events."""

from __future__ import annotations

import numpy as np
import pytest

from infra.datasets.generator import GeneratorPolicy, generate

POLICY = GeneratorPolicy(users=300, items=600, categories=20, events=40_000)


def test_same_seed_same_table() -> None:
    """Policy and seed determine the table; another seed gives another table."""
    assert generate(POLICY, 7).equals(generate(POLICY, 7))
    assert not generate(POLICY, 7).equals(generate(POLICY, 8))


@pytest.mark.parametrize("events", [1, 2, 999, 40_000])
def test_exact_number_of_events_with_unique_ids(events: int) -> None:
    """The table has exactly the requested number of rows, each with an event id of its own."""
    table = generate(GeneratorPolicy(events=events), 1)
    assert len(table) == events
    assert len(set(table["event_id"].to_pylist())) == events


def test_late_events_follow_newer_ones() -> None:
    """About `late_fraction` of the rows are older than a row before them; with 0, none is."""
    late = _late_share(GeneratorPolicy(events=40_000, late_fraction=0.05))
    assert 0.03 < late < 0.06
    assert _late_share(GeneratorPolicy(events=40_000, late_fraction=0.0)) == 0.0


def test_bursts_raise_the_rate() -> None:
    """The busiest thousandth of the time span has at least ten times the average number of events."""
    table = generate(POLICY, 3)
    counts, _ = np.histogram(table["timestamp_ms"].to_numpy(), bins=1_000)
    assert counts.max() > 10 * counts.mean()


def test_tastes_hold_within_a_part_and_drift_over_the_span() -> None:
    """A user's actions share a category at least twice as often when close in time as when far apart."""
    table = generate(GeneratorPolicy(users=50, items=600, categories=20, events=40_000, late_fraction=0), 5)
    users, times = table["user_id"].to_numpy(), table["timestamp_ms"].to_numpy()
    category = np.array([int(item[5:]) // 30 for item in table["item_id"].to_pylist()])
    near, far = [], []
    for user in np.unique(users):
        rows = np.flatnonzero(users == user)
        if len(rows) < 200:
            continue
        half = len(rows) // 2
        near.append(_agreement(category[rows[:50]], category[rows[50:100]]))
        far.append(_agreement(category[rows[:50]], category[rows[-50:]]))
        assert times[rows[half]] < times[rows[-1]]
    print(f"near {np.mean(near):.2f}, far {np.mean(far):.2f}")
    assert np.mean(near) > 2 * np.mean(far)


def _late_share(policy: GeneratorPolicy) -> float:
    times = generate(policy, 2)["timestamp_ms"].to_numpy()
    return float((np.maximum.accumulate(times) > times).mean())


def _agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Return the share of pairs with equal categories."""
    return float((one[:, None] == other[None, :]).mean())
