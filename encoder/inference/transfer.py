"""Copies between the host and a CUDA device: one each way, through pinned memory. On the CPU nothing is copied."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from encoder.arrays import F32, I64


def to_device(device: torch.device, *columns: I64) -> list[Tensor]:
    """Return columns [N_i] as tensors on the device; they reach a GPU in a single copy that the host does not wait for.

    The pinned memory comes from torch's pool, which does not reuse it before the copy is done.
    """
    if device.type == "cpu":
        return [torch.from_numpy(column) for column in columns]
    packed = torch.from_numpy(np.concatenate(columns)).pin_memory()
    return list(torch.split(packed.to(device, non_blocking=True), [len(column) for column in columns]))


def to_host(rows: Tensor) -> F32:
    """Return rows on the host, after everything they depend on has been computed: the only wait of a pass."""
    if rows.device.type == "cpu":
        return rows.numpy()
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    host.copy_(rows, non_blocking=True)
    torch.cuda.current_stream(rows.device).synchronize()
    return host.numpy()
