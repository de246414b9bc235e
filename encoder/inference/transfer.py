"""Between the host and a CUDA device: one copy each way, through pinned memory; on the CPU nothing is copied."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from encoder.arrays import F32
from encoder.inference.plan import Int64s


def sent(device: torch.device, *columns: Int64s) -> list[Tensor]:
    """Columns [N_i] as tensors on the device; to a GPU in a single copy, which nobody waits for.

    The pinned memory is of torch's pool, which does not give it out again before the copy is done.
    """
    if device.type == "cpu":
        return [torch.from_numpy(column) for column in columns]
    packed = torch.from_numpy(np.concatenate(columns)).pin_memory()
    return list(torch.split(packed.to(device, non_blocking=True), [len(column) for column in columns]))


def fetched(rows: Tensor) -> F32:
    """Rows on the host, once everything that leads to them has been computed: the one wait of a step."""
    if rows.device.type == "cpu":
        return rows.numpy()
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    host.copy_(rows, non_blocking=True)
    torch.cuda.current_stream(rows.device).synchronize()
    return host.numpy()
