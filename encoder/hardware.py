"""Hardware: the device of a process, a description of the machine, and choices that depend on its speed.

Choices are made by measurements of at most a second, on the machine as it is loaded now.
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
"""Speed-up that justifies a choice with a cost (accuracy, a second core)."""


class DeviceError(StreamformerError):
    """There is no device for this process; the text says what to do."""


def own_device() -> torch.device:
    """Return the CUDA device with this process's local rank, or the CPU if the machine has no CUDA device.

    Raises `DeviceError` if the machine has more processes than devices.
    """
    if not torch.cuda.is_available():
        return CPU
    number, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= devices:
        raise DeviceError(
            f"process {number + 1} of this machine finds {devices} CUDA devices: start at most one process per device, "
            'or compute on CPUs with CUDA_VISIBLE_DEVICES=""'
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def gpu_precision() -> torch.dtype:
    """Return the precision of matrix products on the CUDA device: bfloat16 if the device has it in hardware."""
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def machine() -> dict[str, Any]:
    """Return the name of the processor, the number of usable cores, and the instructions that matter for speed."""
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
    """Return the number of threads for small training steps: all cores if that is clearly faster, else one.

    Threads that wait for each other are very slow on a machine with other load: steps of 12 ms took 380 ms.
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
    """Return the name of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def faster_precision(device_type: str = "cpu") -> torch.dtype:
    """Return the precision of the encoder's matrix products: bfloat16 if it is clearly faster, else float32.

    On a GPU the answer comes from the hardware's description, without a measurement. On a CPU that emulates bfloat16, a
    product can take a hundred times as long, so a slow first product already decides.
    """
    if device_type == "cuda":
        return gpu_precision()

    def taken(dtype: torch.dtype, rounds: int) -> float:
        a, b = torch.ones(512, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)
        return min(_seconds(lambda: a @ b) for _ in range(rounds))

    full = taken(torch.float32, ROUNDS)
    if taken(torch.bfloat16, 1) > 5 * full:
        return torch.float32
    return torch.bfloat16 if taken(torch.bfloat16, ROUNDS) * WORTH < full else torch.float32


def _small_step() -> None:
    """Do products and elementwise work similar to a training step of the smallest encoder."""
    x, w = torch.ones(1_600, 64), torch.ones(64, 256)
    for _ in range(20):
        torch.tanh(x @ w).sum()


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
