"""Trouble in the input: records that are no actions, huge ones, duplicates, disorder, a transactional producer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from infra.chaos.fault_context import FaultContext, Steps

SECONDS = (8.0, 12.0)


def poison(context: FaultContext) -> Steps:
    """One record in ten is no action, in every way that has a reason."""
    yield from _with(context, poison=0.1)


def oversized(context: FaultContext) -> Steps:
    """Some records are larger than a value may be, up to nearly what the broker takes (above 1 MB)."""
    yield from _with(context, oversized=0.003)


def disordered(context: FaultContext) -> Steps:
    """One event in five comes twice, one in three behind younger ones; users are forgotten meanwhile."""
    yield from _with(context, duplicates=0.2, disorder=0.33, tombstones=0.01)


def transactional(context: FaultContext) -> Steps:
    """The producer writes in transactions and aborts one in five: control records leave gaps between offsets."""
    yield from _with(context, transactional=True)


def _with(context: FaultContext, **options: Any) -> Steps:
    before = context.workload.options
    context.workload.options = replace(before, **options)
    try:
        yield context.rng.uniform(*SECONDS)
    finally:
        context.workload.options = before
