"""Freshness, latency and skew are apart, and a producer's clock spoils only those that contain it."""

from __future__ import annotations

import numpy as np
import pytest

from streams.telemetry.metrics import Histogram, Metrics
from streams.telemetry.times import OBSERVED_AT_ONCE_EVENTS, SkewMeter, observe_published

NOW_MS = 1_700_000_000_000


def totals(histogram: Histogram) -> tuple[int, float]:
    """Return number and sum of the observations."""
    [held] = histogram.samples().values()
    return int(held.counts.sum()), held.total


def test_a_time_in_the_future_counts_as_zero_and_apart() -> None:
    """An embedding 5 minutes ahead is counted as clamped, and the two others keep their freshness."""
    metrics, ago_ms = Metrics(), np.array([20, -300_000, 0])
    observe_published(metrics, NOW_MS, NOW_MS - ago_ms, NOW_MS - np.array([10, 10, 10]))
    assert totals(metrics.freshness_seconds) == (3, pytest.approx(0.02))
    assert metrics.freshness_clamped.value() == 1
    assert totals(metrics.latency_seconds) == (3, pytest.approx(0.03))


def test_latency_leaves_out_what_arrived_at_an_unknown_time() -> None:
    """A user that was read from disk has no arrival time; an arrival after the present counts as 0."""
    metrics = Metrics()
    observe_published(metrics, NOW_MS, np.full(3, NOW_MS), np.array([-(2**62), NOW_MS - 40, NOW_MS + 7]))
    assert totals(metrics.latency_seconds) == (2, pytest.approx(0.04))


def test_skew_has_one_histogram_per_sign() -> None:
    """An event is behind or ahead, never both, and each sum is positive."""
    metrics = Metrics()
    meter = SkewMeter(metrics)
    for ahead_ms in ([-2_000, 0], [300_000, 60_000]):
        meter.add(np.full(2, NOW_MS), NOW_MS + np.array(ahead_ms))
    meter.observe()
    assert totals(metrics.skew_behind_seconds) == (2, pytest.approx(2.0))
    assert totals(metrics.skew_ahead_seconds) == (2, pytest.approx(360.0))


def test_freshness_is_latency_plus_skew() -> None:
    """Latency and skew add up to freshness when every clock is right."""
    metrics, rng = Metrics(), np.random.default_rng(5)
    event_ms = NOW_MS - rng.integers(1_000, 2_000, 50)
    arrival_ms = event_ms + rng.integers(0, 900, 50)
    meter = SkewMeter(metrics)
    meter.add(arrival_ms, event_ms)
    meter.observe()
    observe_published(metrics, NOW_MS, event_ms, arrival_ms)
    parts = totals(metrics.latency_seconds)[1] + totals(metrics.skew_behind_seconds)[1]
    assert totals(metrics.freshness_seconds)[1] == pytest.approx(parts)


def test_a_meter_holds_a_bounded_number_of_events() -> None:
    """Small batches wait to be observed together, and are observed without a call once they are many; once each."""
    metrics = Metrics()
    meter, one = SkewMeter(metrics), np.full(1, NOW_MS)
    for _ in range(OBSERVED_AT_ONCE_EVENTS - 1):
        meter.add(one, one)
    assert totals(metrics.skew_behind_seconds)[0] == 0
    meter.add(one, one)
    for _ in range(2):
        assert totals(metrics.skew_behind_seconds)[0] == OBSERVED_AT_ONCE_EVENTS
        meter.observe()
