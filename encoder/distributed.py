"""The group of training processes: one process, or those that torchrun started, each with a CUDA device if available.

Each process takes its share of the batches and samples its own pool of negatives (`random_negatives` and its own
positives). Gradients are averaged, so the weights of all processes stay equal.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from encoder.hardware import CPU, own_device


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """Rank of this process, size of the group, and the device that this process trains on."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes; a missing gradient counts as zero."""
        if self.size == 1:
            return
        ours = list(parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in ours]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        parts = torch.split(flat, [p.numel() for p in ours])
        for parameter, part in zip(ours, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def total(self, value: int) -> int:
        """Return the sum over the processes."""
        return int(self._reduced(float(value), dist.ReduceOp.SUM)) if self.size > 1 else value

    def maximum(self, value: float) -> float:
        """Return the largest value of all processes, so that they agree on the time spent."""
        return self._reduced(value, dist.ReduceOp.MAX) if self.size > 1 else value

    def gather(self, values: Tensor) -> Tensor:
        """Return the tensors [...] of all processes in order of rank, on the CPU: [processes, ...]."""
        if self.size == 1:
            return values.unsqueeze(0).cpu()
        ours = values.to(self.device)
        gathered = [torch.empty_like(ours) for _ in range(self.size)]
        dist.all_gather(gathered, ours)
        return torch.stack(gathered).cpu()

    def _reduced(self, value: float, operation: dist.ReduceOp.RedOpType) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return float(tensor)


def is_main_process() -> bool:
    """Return whether this is the main process, the only one that prints and writes files."""
    return os.environ.get("RANK", "0") == "0"


def join_process_group() -> ProcessGroup:
    """Join the group of torchrun if it started this process: NCCL on GPUs, gloo on CPUs. Raises `DeviceError`."""
    device = own_device()
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ProcessGroup(device=device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return ProcessGroup(dist.get_rank(), dist.get_world_size(), device)
