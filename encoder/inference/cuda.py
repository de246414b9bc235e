"""Forward passes on a CUDA device: the reference kernel with its slabs there, and CUDA graphs for the usual case.

Most users of a stream have one new token each. A pass over such users is padded to a fixed number of users, so its
shapes never change. It is a function of one integer tensor (`SingleTokenPass.compute`) and reads nothing back from the
device, so it is recorded once as a CUDA graph and replayed with a single launch. Padding uses a spare slot that no user
owns.

Users with several new tokens are computed separately, operation by operation, as on the CPU. Integers reach the device
through pinned memory. The host waits once per batch, for all embeddings together.

Shapes: S users, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32, I64
from encoder.features import Features
from encoder.inference.forward import Buffers, ForwardPass
from encoder.inference.plan import plan_tokens
from encoder.inference.reference import TorchKernel
from encoder.inference.transfer import to_device, to_host
from encoder.release import Release

SIZES = (64, 256, 1_024)
"""Users of a padded pass; a pass over more users than the last size is not padded."""
WARM_UP = 3
"""Passes before the recording, in which libraries initialise themselves."""
COLUMNS = tuple(Features.__slots__)


class CudaForwardPass(ForwardPass):
    """A `ForwardPass` on the device of the release's model and of `kernel`, whose last slot must be spare."""

    def __init__(self, release: Release, kernel: TorchKernel, dtype: torch.dtype) -> None:
        super().__init__(release, kernel, dtype)
        self.kernel = kernel
        self.singles = [SingleTokenPass(self, size) for size in SIZES]

    @torch.inference_mode()
    def run(self, batch: SequenceBatch, users: I64, slots: I64, fresh: I64, firsts: I64) -> F32:
        """Return embeddings [S, E] as `ForwardPass.run` does: users with one new token first, then the others."""
        order = np.argsort(fresh > 1, kind="stable")  # [S] users with one new token, then the others
        parts = np.split(order, [np.count_nonzero(fresh == 1)])
        started = [self._start(batch, users[p], slots[p], fresh[p], firsts[p]) for p in parts if len(p)]
        return to_host(torch.cat(started))[np.argsort(order)]  # argsort of a permutation is its inverse

    def _start(self, batch: SequenceBatch, users: I64, slots: I64, fresh: I64, firsts: I64) -> Tensor:
        """Return embeddings [S, E] of users who all have one new token, or all have several.

        The device may still be computing them.
        """
        plan = plan_tokens(slots, batch.counts[users], fresh, firsts, self.windows)
        features = self._features(batch, users, fresh, plan.positions)
        columns = [getattr(features, name).numpy() for name in COLUMNS]
        single = next((each for each in self.singles if each.size >= len(users)), None)
        if single is not None and fresh[0] == 1:
            return single.run([*columns, slots, plan.offsets])
        self.kernel.begin(plan, features.time_ms.numpy())
        return self.embed(Features(*to_device(self.kernel.device, *columns)), plan.layers, self.buffers)

    def capture(self) -> None:
        """Record the padded passes as CUDA graphs; until then they run operation by operation."""
        for single in self.singles:
            single.capture()


class SingleTokenPass:
    """A padded forward pass over at most `size` users with one new token each."""

    def __init__(self, parent: CudaForwardPass, size: int) -> None:
        ones = np.ones(size, np.int64)
        self.size = size
        self._parent = parent
        self._layers = plan_tokens(ones, ones, ones, ones, parent.windows).layers
        self.buffers = Buffers(parent.buffers.dtype, parent.kernel.device)
        """Scratch memory of this pass alone: a recorded graph keeps using the addresses it was recorded with."""
        self.inputs = torch.zeros(len(COLUMNS) + 2, size, dtype=torch.int64, device=parent.kernel.device)
        """Inputs [9, size]: the columns of `Features`, then slots and offsets."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._embeddings: Tensor | None = None

    def run(self, rows: Sequence[I64]) -> Tensor:
        """Return embeddings [S, E] for the rows [S] of `inputs`; they are valid until the next run."""
        self._fill(np.stack(rows))
        if self._graph is None:
            embeddings = self.compute()
        else:
            assert self._embeddings is not None
            self._graph.replay()
            embeddings = self._embeddings
        return embeddings[: len(rows[0])]

    def compute(self) -> Tensor:
        """Return embeddings [size, E] of what `inputs` holds, using tensors of the device only."""
        *columns, slots, offsets = self.inputs
        features = Features(*columns)
        self._parent.kernel.begin_single(slots, offsets, features.position, features.time_ms)
        return self._parent.embed(features, self._layers, self.buffers)

    @torch.inference_mode()
    def capture(self) -> None:
        """Record `compute` after a few warm-up runs on a side stream, all of them on padding alone."""
        self._fill(np.zeros((len(self.inputs), 0), np.int64))
        main = torch.cuda.current_stream(self.inputs.device)
        side = torch.cuda.Stream(self.inputs.device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.compute()
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._embeddings = self.compute()
        self._graph = graph

    def _fill(self, rows: I64) -> None:
        """Copy rows [9, S] into `inputs`, followed by padding: unknown actions at time 0 in the spare slot.

        columns 0 to S - 1      rows
        columns S to size - 1   0 in every row; slots = the last slot
        """
        padded = np.zeros(self.inputs.shape, np.int64)
        padded[-2] = len(self._parent.kernel.times_ms) - 1  # the row of slots
        padded[:, : rows.shape[1]] = rows
        self.inputs.copy_(to_device(self.inputs.device, padded.ravel())[0].view_as(self.inputs))
