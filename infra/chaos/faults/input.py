"""Send difficult input: records that are no actions, huge ones, duplicates, disorder, transactions."""

from __future__ import annotations

from typing import Any

from infra.chaos.fault_context import FaultContext, Steps

SECONDS = (8.0, 12.0)


def poison(context: FaultContext) -> Steps:
    """Make one record in ten no action, for each reason that exists."""
    yield from _with(context, poison=0.1)


def oversized(context: FaultContext) -> Steps:
    """Send some records above the limit of a value, up to almost the limit of the broker (over 1 MB)."""
    yield from _with(context, oversized=0.003)


def disordered(context: FaultContext) -> Steps:
    """Send one event in five twice and one in three late, with tombstones in between."""
    yield from _with(context, duplicates=0.2, disorder=0.33, tombstones=0.01)


def transactional(context: FaultContext) -> Steps:
    """Produce in transactions and abort one in five: control records leave gaps between offsets."""
    yield from _with(context, transactional=True)


def _with(context: FaultContext, **options: Any) -> Steps:
    with context.workload.changed(**options):
        yield context.rng.uniform(*SECONDS)
