"""Faults of the encoder: its release gone or altered, its answers no numbers, its speed a tenth."""

from __future__ import annotations

import time

from infra.chaos.fault_context import Scene, Steps
from infra.chaos.faults.workers import LAUNCHER
from infra.harness.supervisor import REFUSED, WORKER

LOOK_S, REFUSED_MAX_S = 0.2, 60.0


def missing(scene: Scene) -> Steps:
    """The release is not there when the workers start."""
    folder = scene.stage.release_dir
    away = folder.with_name("release-away")
    folder.rename(away)
    try:
        yield from _refused(scene)
    finally:
        away.rename(folder)


def corrupt(scene: Scene) -> Steps:
    """One bit of the weights is another when the workers start."""
    weights = scene.stage.release_dir / "weights.safetensors"
    whole = weights.read_bytes()
    altered = bytearray(whole)
    altered[scene.dice.randrange(len(whole) // 2, len(whole))] ^= 1
    weights.write_bytes(altered)
    try:
        yield from _refused(scene)
    finally:
        weights.write_bytes(whole)


def nan(scene: Scene) -> Steps:
    """Every embedding is NaN for some seconds: users wait, nothing wrong is published."""
    yield from _launched(scene, "nan", 8.0)


def slow(scene: Scene) -> Steps:
    """The encoder takes ten times as long."""
    yield from _launched(scene, "slow", 12.0)


def _launched(scene: Scene, fault: str, seconds: float) -> Steps:
    scene.trial.fleet.command = (*LAUNCHER, fault, *WORKER[3:])
    try:
        _kill_all(scene)
        yield from scene.until_ready(0)
        yield seconds
    finally:
        scene.trial.fleet.command = WORKER
        _kill_all(scene)


def _refused(scene: Scene) -> Steps:
    """Kill all, and wait until one that was started again has refused to begin twice, or had the time to."""
    exits = scene.trial.fleet.exits
    before, until_s = len(exits), time.monotonic() + REFUSED_MAX_S
    _kill_all(scene)
    while time.monotonic() < until_s and sum(each.code == REFUSED for each in exits[before:]) < 2:
        yield LOOK_S


def _kill_all(scene: Scene) -> None:
    for number in scene.trial.fleet.running():
        scene.trial.fleet.kill(number)
