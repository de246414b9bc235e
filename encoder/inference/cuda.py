"""Steps on a CUDA device: the twin's kernel, its slabs on the device, and a CUDA graph for what happens most.

Most users of a stream have one new token each. A step of those is padded to a fixed number of users and is a function
of one tensor of integers, `SingleStep.compute`, which asks the device for nothing and whose shapes do not change; so it
is recorded once and replayed by a single launch. Padding belongs to a slot that is nobody's. Users with several new
tokens are computed apart from them, operation by operation as on the CPU. Integers go to the device through pinned
memory, and the host waits once, for the embeddings of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32
from encoder.features import Features
from encoder.inference.forward import Buffers, Steps
from encoder.inference.plan import Int64s, plan_tokens
from encoder.inference.reference import TorchKernel
from encoder.inference.transfer import fetched, sent
from encoder.release import Release

SIZES = (64, 256, 1_024)
"""Users of a padded step; one of more users than the last is not padded."""
WARM_UP = 3
"""Runs before a step is recorded, in which libraries set themselves up."""
COLUMNS = tuple(Features.__slots__)


class CudaSteps(Steps):
    """`Steps` on the device of the release's model and of `kernel`, whose last slot must be nobody's."""

    def __init__(self, release: Release, kernel: TorchKernel, dtype: torch.dtype) -> None:
        super().__init__(release, kernel, dtype)
        self.kernel = kernel
        self.singles = [SingleStep(self, size) for size in SIZES]

    @torch.inference_mode()
    def run(self, batch: SequenceBatch, users: Int64s, slots: Int64s, fresh: Int64s, firsts: Int64s) -> F32:
        order = np.argsort(fresh > 1, kind="stable")
        parts = np.split(order, [np.count_nonzero(fresh == 1)])
        started = [self._start(batch, users[p], slots[p], fresh[p], firsts[p]) for p in parts if len(p)]
        return fetched(torch.cat(started))[np.argsort(order)]

    def _start(self, batch: SequenceBatch, users: Int64s, slots: Int64s, fresh: Int64s, firsts: Int64s) -> Tensor:
        """Embeddings [S, E] of users with one new token each, or of others; the device may still be at it."""
        plan = plan_tokens(slots, batch.counts[users], fresh, firsts, self.windows)
        features = self._features(batch, users, fresh, plan.positions)
        columns = [getattr(features, name).numpy() for name in COLUMNS]
        single = next((each for each in self.singles if each.size >= len(users)), None)
        if single is not None and fresh[0] == 1:
            return single.run([*columns, slots, plan.offsets])
        self.kernel.begin(plan, features.time_ms.numpy())
        return self.embed(Features(*sent(self.kernel.device, *columns)), plan.layers, self.buffers)

    def capture(self) -> None:
        """Record the padded steps; until then they run operation by operation."""
        for single in self.singles:
            single.capture()


class SingleStep:
    """A step of at most `size` users with one new token each."""

    def __init__(self, steps: CudaSteps, size: int) -> None:
        ones = np.ones(size, np.int64)
        self.size = size
        self._steps = steps
        self._layers = plan_tokens(ones, ones, ones, ones, steps.windows).layers
        self.buffers = Buffers(steps.buffers.dtype, steps.kernel.device)
        """Its own: what was recorded goes on using the addresses that it was recorded with."""
        self.inputs = torch.zeros(len(COLUMNS) + 2, size, dtype=torch.int64, device=steps.kernel.device)
        """The columns of `Features`, slots and offsets."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._embeddings: Tensor | None = None

    def run(self, rows: Sequence[Int64s]) -> Tensor:
        """Embeddings [S, E] for the rows [S] of `inputs`, valid until the next run."""
        self._fill(np.stack(rows))
        if self._graph is None:
            embeddings = self.compute()
        else:
            assert self._embeddings is not None
            self._graph.replay()
            embeddings = self._embeddings
        return embeddings[: len(rows[0])]

    def compute(self) -> Tensor:
        """Embeddings [size, E] of what `inputs` holds: tensors of the device in, tensors of the device out."""
        *columns, slots, offsets = self.inputs
        features = Features(*columns)
        self._steps.kernel.begin_single(slots, offsets, features.position, features.time_ms)
        return self._steps.embed(features, self._layers, self.buffers)

    @torch.inference_mode()
    def capture(self) -> None:
        """Record `compute`, after a few runs on a stream of their own; all of them on nothing but padding."""
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

    def _fill(self, rows: Int64s) -> None:
        """Put rows [9, S] into `inputs`, and padding behind them: unknown actions at time 0 in the slot of nobody."""
        padded = np.zeros(self.inputs.shape, np.int64)
        padded[-2] = len(self._steps.kernel.times_ms) - 1
        padded[:, : rows.shape[1]] = rows
        self.inputs.copy_(sent(self.inputs.device, padded.ravel())[0].view_as(self.inputs))
