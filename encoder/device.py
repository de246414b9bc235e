"""Where a process computes: on its CUDA device, or on the CPU."""

from __future__ import annotations

import os

import torch

CPU = torch.device("cpu")


class DeviceError(ValueError):
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
