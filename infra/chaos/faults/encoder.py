"""Break the encoder: a missing or altered release, NaN embeddings, a tenth of the speed."""

from __future__ import annotations

import time

from infra.chaos.fault_context import FaultContext, Steps
from infra.chaos.faults.workers import FAULTY_WORKER
from infra.harness.supervisor import CANNOT_START
from infra.harness.worker_process import WORKER

LOOK_S, FAILED_MAX_S = 0.2, 60.0


def missing(context: FaultContext) -> Steps:
    """Remove the release while the workers start."""
    folder = context.deployment.release_dir
    away = folder.with_name("release-away")
    folder.rename(away)
    try:
        yield from _fail_to_start(context)
    finally:
        away.rename(folder)


def corrupt(context: FaultContext) -> Steps:
    """Flip one bit of the weights while the workers start."""
    weights = context.deployment.release_dir / "weights.safetensors"
    whole = weights.read_bytes()
    altered = bytearray(whole)
    altered[context.rng.randrange(len(whole) // 2, len(whole))] ^= 1
    weights.write_bytes(altered)
    try:
        yield from _fail_to_start(context)
    finally:
        weights.write_bytes(whole)


def nan(context: FaultContext) -> Steps:
    """Make every embedding NaN for some seconds: users wait, and nothing wrong is published."""
    yield from _run_faulty(context, "nan", 8.0)


def slow(context: FaultContext) -> Steps:
    """Make the encoder take ten times as long."""
    yield from _run_faulty(context, "slow", 12.0)


def _run_faulty(context: FaultContext, fault: str, seconds: float) -> Steps:
    context.run.supervisor.command = (*FAULTY_WORKER, fault, *WORKER[3:])
    try:
        _kill_all(context)
        yield from context.until_ready(0)
        yield seconds
    finally:
        context.run.supervisor.command = WORKER
        _kill_all(context)


def _fail_to_start(context: FaultContext) -> Steps:
    """Kill all workers, and wait until restarted ones have failed to start twice, or the time is up."""
    exits = context.run.supervisor.exits
    before, until_s = len(exits), time.monotonic() + FAILED_MAX_S
    _kill_all(context)
    while time.monotonic() < until_s and sum(each.code == CANNOT_START for each in exits[before:]) < 2:
        yield LOOK_S


def _kill_all(context: FaultContext) -> None:
    for number in context.run.supervisor.running():
        context.run.supervisor.kill(number)
