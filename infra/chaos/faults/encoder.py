"""Faults of the encoder: its release gone or altered, its answers no numbers, its speed a tenth."""

from __future__ import annotations

import time

from infra.chaos.fault_context import FaultContext, Steps
from infra.chaos.faults.workers import FAULTY_WORKER
from infra.harness.supervisor import REFUSED, WORKER

LOOK_S, REFUSED_MAX_S = 0.2, 60.0


def missing(context: FaultContext) -> Steps:
    """The release is not there when the workers start."""
    folder = context.deployment.release_dir
    away = folder.with_name("release-away")
    folder.rename(away)
    try:
        yield from _refused(context)
    finally:
        away.rename(folder)


def corrupt(context: FaultContext) -> Steps:
    """One bit of the weights is another when the workers start."""
    weights = context.deployment.release_dir / "weights.safetensors"
    whole = weights.read_bytes()
    altered = bytearray(whole)
    altered[context.rng.randrange(len(whole) // 2, len(whole))] ^= 1
    weights.write_bytes(altered)
    try:
        yield from _refused(context)
    finally:
        weights.write_bytes(whole)


def nan(context: FaultContext) -> Steps:
    """Every embedding is NaN for some seconds: users wait, nothing wrong is published."""
    yield from _launched(context, "nan", 8.0)


def slow(context: FaultContext) -> Steps:
    """The encoder takes ten times as long."""
    yield from _launched(context, "slow", 12.0)


def _launched(context: FaultContext, fault: str, seconds: float) -> Steps:
    context.run.supervisor.command = (*FAULTY_WORKER, fault, *WORKER[3:])
    try:
        _kill_all(context)
        yield from context.until_ready(0)
        yield seconds
    finally:
        context.run.supervisor.command = WORKER
        _kill_all(context)


def _refused(context: FaultContext) -> Steps:
    """Kill all, and wait until one that was started again has refused to begin twice, or had the time to."""
    exits = context.run.supervisor.exits
    before, until_s = len(exits), time.monotonic() + REFUSED_MAX_S
    _kill_all(context)
    while time.monotonic() < until_s and sum(each.code == REFUSED for each in exits[before:]) < 2:
        yield LOOK_S


def _kill_all(context: FaultContext) -> None:
    for number in context.run.supervisor.running():
        context.run.supervisor.kill(number)
