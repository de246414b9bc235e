"""Trouble in the input: records that are no actions, huge ones, duplicates, disorder, a transactional producer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from infra.chaos.fault_context import Scene, Steps

SECONDS = (8.0, 12.0)


def poison(scene: Scene) -> Steps:
    """One record in ten is no action, in every way that has a reason."""
    yield from _with(scene, poison=0.1)


def oversized(scene: Scene) -> Steps:
    """Some records are larger than a value may be, up to nearly what the broker takes (above 1 MB)."""
    yield from _with(scene, oversized=0.003)


def disordered(scene: Scene) -> Steps:
    """One event in five comes twice, one in three behind younger ones; users are forgotten meanwhile."""
    yield from _with(scene, duplicates=0.2, disorder=0.33, tombstones=0.01)


def transactional(scene: Scene) -> Steps:
    """The producer writes in transactions and aborts one in five: control records leave gaps between offsets."""
    yield from _with(scene, transactional=True)


def _with(scene: Scene, **habits: Any) -> Steps:
    before = scene.traffic.habits
    scene.traffic.habits = replace(before, **habits)
    try:
        yield scene.dice.uniform(*SECONDS)
    finally:
        scene.traffic.habits = before
