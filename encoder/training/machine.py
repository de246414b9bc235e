"""What this machine, as it is loaded now, does faster: measured at the start of a training, in a second at most."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import torch

ROUNDS = 7
WORTH = 1.25
"""A choice that costs something (accuracy, a second core) must be so many times faster."""


def faster_threads() -> int:
    """Threads for small training steps: all cores where that pays, else one.

    Threads that wait for each other collapse on a machine that others use too: steps of 12 ms took 380.
    """
    cores = os.cpu_count() or 1
    if cores == 1:
        return 1
    before = torch.get_num_threads()
    seconds: dict[int, list[float]] = {1: [], cores: []}
    for _ in range(ROUNDS):
        for threads, taken in seconds.items():
            torch.set_num_threads(threads)
            taken.append(_seconds(_small_step))
    torch.set_num_threads(before)
    return cores if median(seconds[cores]) * WORTH < median(seconds[1]) else 1


def faster_precision() -> torch.dtype:
    """Of the encoder's products: bfloat16 where it pays, else float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2_048, 256, dtype=dtype), torch.ones(256, 1_024, dtype=dtype)
        seconds[dtype] = median(_seconds(lambda a=a, b=b: a @ b) for _ in range(ROUNDS))  # type: ignore[misc]
    return torch.bfloat16 if seconds[torch.bfloat16] * WORTH < seconds[torch.float32] else torch.float32


def _small_step() -> None:
    """Products and elementwise work like a step of the smallest encoder."""
    x, w = torch.ones(1_600, 64), torch.ones(64, 256)
    for _ in range(20):
        torch.tanh(x @ w).sum()


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
