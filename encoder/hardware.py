"""The hardware: the device a process computes on, what the machine is, and which choices are faster on it.

Choices are made by measurement, in a second at most, on the machine as it is loaded now.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from encoder.errors import StreamformerError

CPU = torch.device("cpu")
ROUNDS = 7
WORTH = 1.25
"""A choice that costs something (accuracy, a second core) must be so many times faster."""


class DeviceError(StreamformerError):
    """No device for this process; the text says what to do."""


def own_device() -> torch.device:
    """This process's CUDA device, by its number among the machine's processes; the CPU where there are no devices.

    Raises `DeviceError`.
    """
    if not torch.cuda.is_available():
        return CPU
    number, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= devices:
        raise DeviceError(
            f"process {number + 1} of this machine finds {devices} CUDA devices: start one for each device at most, "
            'or compute on CPUs with CUDA_VISIBLE_DEVICES=""'
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def gpu_precision() -> torch.dtype:
    """Of products on a CUDA device: bfloat16 where it multiplies in it and does not emulate that."""
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def machine() -> dict[str, Any]:
    """The processor as the system names it, cores that may be used, and the instructions that decide speed."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    named = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set(named.get("flags", "").split())
    return {
        "cpu": named.get("model name", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "amx": "amx_tile" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
    }


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


def device_name(device: torch.device) -> str:
    """What a GPU calls itself, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def faster_precision(device_type: str = "cpu") -> torch.dtype:
    """Of the encoder's products: bfloat16 where it pays, else float32; on a GPU, where it multiplies in bfloat16.

    Where bfloat16 is emulated a product can take a hundred times as long, so the first one may already decide.
    """
    if device_type == "cuda":
        return gpu_precision()

    def taken(dtype: torch.dtype, rounds: int) -> float:
        a, b = torch.ones(512, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)
        return min(_seconds(lambda: a @ b) for _ in range(rounds))

    whole = taken(torch.float32, ROUNDS)
    if taken(torch.bfloat16, 1) > 5 * whole:
        return torch.float32
    return torch.bfloat16 if taken(torch.bfloat16, ROUNDS) * WORTH < whole else torch.float32


def _small_step() -> None:
    """Products and elementwise work like a step of the smallest encoder."""
    x, w = torch.ones(1_600, 64), torch.ones(64, 256)
    for _ in range(20):
        torch.tanh(x @ w).sum()


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
