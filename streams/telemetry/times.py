"""Freshness, latency and skew from columns of times, observed once per batch.

    event time        arrival time               publish time
    |<---- skew ---->|<--------- latency -------->|
    |<---------------- freshness ---------------->|

The clock of a producer decides where event time is. If it runs ahead, skew and freshness turn negative. Negative
freshness is counted as 0 and apart, and skew has one histogram per sign; latency does not depend on producers.
"""

from __future__ import annotations

import numpy as np

from encoder.arrays import I64
from streams.telemetry.metrics import Metrics

OBSERVED_AT_ONCE_EVENTS = 1_000
"""Events from which on a `SkewMeter` waits no longer."""


def observe_published(metrics: Metrics, now_ms: int, newest_event_ms: I64, arrival_ms: I64) -> None:
    """Observe embeddings acknowledged at `now_ms`; a negative arrival time is unknown and is left out."""
    freshness_ms = now_ms - newest_event_ms
    metrics.freshness_clamped.inc(int((freshness_ms < 0).sum()))
    metrics.freshness_seconds.observe_many(np.maximum(freshness_ms, 0) / 1000)
    arrived_ms = arrival_ms[arrival_ms >= 0]
    metrics.latency_seconds.observe_many(np.maximum(now_ms - arrived_ms, 0) / 1000)


class SkewMeter:
    """Skew of events, observed for many small batches at once: one observation costs as much as ten events."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._waiting: list[I64] = []
        self._events = 0

    def add(self, arrival_ms: I64, event_ms: I64) -> None:
        """Take a batch; it is observed with the next ones, at `observe` at the latest."""
        self._waiting.append(arrival_ms - event_ms)
        self._events += len(event_ms)
        if self._events >= OBSERVED_AT_ONCE_EVENTS:
            self.observe()

    def observe(self) -> None:
        """Observe what waits."""
        if not self._waiting:
            return
        skew_s = np.concatenate(self._waiting) / 1000
        self._waiting, self._events = [], 0
        is_ahead = skew_s < 0
        if is_ahead.any():
            self._metrics.skew_ahead_seconds.observe_many(-skew_s[is_ahead])
            skew_s = skew_s[~is_ahead]
        self._metrics.skew_behind_seconds.observe_many(skew_s)
