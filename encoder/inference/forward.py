"""The forward pass: the new tokens of some users through every layer, over their cached keys and values.

It uses the same weights and the same functions as the model's own forward pass (`encoder.model`), taken apart so that
only the rows named by a plan are computed. All rows of a batch, of all users, are packed into one matrix:

    features [T] -> _Input -> x [T, D] -> _Layer 0 -> x [Q0, D] -> _Layer 1 -> ... -> x [S, D] -> _Head -> [S, E]

Each layer keeps only the rows that the next one needs (`plan.py`), so the matrix shrinks to one row per user. Between
layers the residual is a pair: x, and y, which the next layer adds to it in the same operation as its LayerNorm.

Shapes: S users, T tokens of the plan, R rows of a layer, Q rows with output (the next layer's R), D model, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32, I64
from encoder.features import Features
from encoder.inference.kernel import Kernel
from encoder.inference.linear import prepare_linear
from encoder.inference.plan import LayerRows, offsets_of, plan_tokens, suffixes
from encoder.inference.transfer import to_device
from encoder.model import Block, Head, StreamingEncoder
from encoder.release import Release


class ForwardPass:
    """Runs forward passes of one release over the slots of one kernel, with products in `dtype`. Not thread-safe."""

    def __init__(self, release: Release, kernel: Kernel, dtype: torch.dtype) -> None:
        model = release.model
        if not isinstance(model, StreamingEncoder):
            raise TypeError("a window encoder computes nothing that could be cached; load it with kind full")
        self.windows = model.config.windows
        self.dtype = str(dtype).removeprefix("torch.")
        self._tokenizer = release.tokenizer
        self._input = _Input(model, kernel, dtype)
        self._kernel = kernel
        self.buffers = Buffers(dtype, model.device)
        self._layers = [_Layer(block, kernel, dtype) for block in model.layers]
        self._head = _Head(model.head, kernel, dtype)

    @torch.inference_mode()
    def run(self, batch: SequenceBatch, users: I64, slots: I64, fresh: I64, firsts: I64) -> F32:
        """Return embeddings [S, E] of `users` [S], indices into the batch, after their newest `fresh` [S] actions.

        `slots` [S] hold what came before, counted from position `firsts` [S]; afterwards they hold the new tokens too.
        """
        plan = plan_tokens(slots, batch.counts[users], fresh, firsts, self.windows)
        features = self._features(batch, users, fresh, plan.positions)
        self._kernel.begin(plan, features.time_ms.numpy())
        return self.embed(features, plan.layers, self.buffers).numpy()

    def embed(self, features: Features, layers: Sequence[LayerRows], buffers: Buffers) -> Tensor:
        """Return embeddings [S, E] from the features [T] of the new tokens, once the kernel has begun the plan."""
        x, y = self._input.run(features, buffers), None  # [T, D]
        for number, (layer, rows) in enumerate(zip(self._layers, layers, strict=True)):
            x, y = layer.run(number, x, y, rows.kept, buffers)  # [Q, D] both
        return self._head.run(x, y, buffers)

    def _features(self, batch: SequenceBatch, users: I64, fresh: I64, positions: I64) -> Features:
        """Return the features [T] of the new tokens.

        Where the action before a user's first new one is kept, it is read too: the time since it is a feature.

            rows of the batch   | older | one before | fresh |   per user
            known                       |<---------->|<----->|
            wanted                                   |<----->|
        """
        ends = batch.starts[users + 1]  # [S]
        known = np.minimum(fresh + 1, ends - batch.starts[users])  # [S]
        rows = np.repeat(ends - np.cumsum(known), known) + np.arange(known.sum())  # [sum of known]
        starts = offsets_of(known)  # [S + 1]
        wanted = suffixes(starts, fresh)  # [T]
        return self._tokenizer.tokenize(batch.actions.take(rows), starts, positions, wanted).features()


class Buffers:
    """Scratch memory by name, reused from pass to pass; no content survives a pass."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._held: dict[tuple[str, int], Tensor] = {}
        self._views: dict[tuple[str, int, int], Tensor] = {}  # a new slice would cost a microsecond each time

    def take(self, name: str, rows: int, width: int) -> Tensor:
        """Return an uninitialised matrix [rows, width]."""
        view = self._views.get((name, rows, width))
        if view is not None:
            return view
        held = self._held.get((name, width))
        if held is None or len(held) < rows:
            held = self._held[name, width] = torch.empty(rows, width, dtype=self.dtype, device=self.device)
            self._views.clear()
        view = self._views[name, rows, width] = held[:rows]
        return view

    @torch.inference_mode()
    def scribble(self) -> None:
        """Fill all buffers with NaN, which shows in the result of any pass that reads what it has not written."""
        for held in self._held.values():
            held.fill_(float("nan"))


class _Input:
    """The model's `inputs`: gathers the columns of each token in scratch memory and projects them."""

    def __init__(self, model: StreamingEncoder, kernel: Kernel, dtype: torch.dtype) -> None:
        self._model, self._kernel = model, kernel
        self._project = prepare_linear(model.project, dtype)
        self._width, self._out = model.project.in_features, model.project.out_features

    def run(self, features: Features, buffers: Buffers) -> Tensor:
        """Return tokens [T, D] in float32."""
        rows = len(features.item)
        columns = buffers.take("columns", rows, self._width)  # [T, width]
        at = 0
        for values in self._model.lookup_columns(features):  # [T, n] each
            columns[:, at : at + values.shape[1]] = values
            at += values.shape[1]
        for encoding, time_ms in self._model.time_columns(features):
            self._kernel.encode_times(encoding, time_ms, columns[:, at : at + encoding.width])
            at += encoding.width
        return self._project(columns, buffers.take("input", rows, self._out)).float()


class _FeedForward:
    """Linear, GELU, Linear."""

    def __init__(self, up: nn.Linear, down: nn.Linear, kernel: Kernel, dtype: torch.dtype) -> None:
        self._up, self._down = prepare_linear(up, dtype, gelu=kernel.gelu), prepare_linear(down, dtype)
        self._width, self._out = up.out_features, down.out_features

    def run(self, x: Tensor, buffers: Buffers) -> Tensor:
        """Return [R, out] of rows x [R, in]."""
        wide = self._up(x, buffers.take("wide", x.shape[0], self._width))  # [R, 4 D]
        return self._down(wide, buffers.take("down", x.shape[0], self._out))


class _Layer:
    """A `Block` over cached keys and values."""

    def __init__(self, block: Block, kernel: Kernel, dtype: torch.dtype) -> None:
        self._kernel = kernel
        self._norms = block.norm_attention, block.norm_ffn
        self._qkv, self._out = prepare_linear(block.qkv, dtype), prepare_linear(block.out, dtype)
        self._qkv_width = block.qkv.out_features
        self._ffn = _FeedForward(block.up, block.down, kernel, dtype)

    def run(self, number: int, x: Tensor, y: Tensor | None, kept: I64 | None, buffers: Buffers) -> _Pair:
        """Return the layer's residual [Q, D] and what is still to be added to it [Q, D], from the same pair [R, D].

        Every row writes its keys and values, but only the rows `kept` [Q] (None: all) have an output.
        """
        normed = buffers.take("normed", *x.shape)  # [R, D]
        self._kernel.add_norm(x, y, self._norms[0], normed)
        qkv = self._qkv(normed, buffers.take("qkv", x.shape[0], self._qkv_width))  # [R, (H + 2 G) K]
        if kept is not None:
            x = x[to_device(x.device, kept)[0]]  # [Q, D]
        mixed = buffers.take("mixed", *x.shape)  # [Q, D]
        self._kernel.attend(number, qkv, mixed)
        added = self._out(mixed, buffers.take("added", *x.shape))  # [Q, D]
        normed = buffers.take("normed", *x.shape)  # [Q, D]
        self._kernel.add_norm(x, added, self._norms[1], normed)
        return x, self._ffn.run(normed, buffers)


_Pair = tuple[Tensor, Tensor]


class _Head:
    """The model's head; the embedding itself is float32 and of length one."""

    def __init__(self, head: Head, kernel: Kernel, dtype: torch.dtype) -> None:
        self._kernel = kernel
        self._norm = head.norm
        self._ffn = _FeedForward(head.up, head.down, kernel, dtype)

    def run(self, x: Tensor, y: Tensor | None, buffers: Buffers) -> Tensor:
        """Return embeddings [S, E] of the last layer's pair x, y [S, D]."""
        normed = buffers.take("normed", *x.shape)  # [S, D]
        self._kernel.add_norm(x, y, self._norm, normed)
        y = self._ffn.run(normed, buffers)  # [S, E]
        embeddings = torch.empty(y.shape, device=y.device)
        self._kernel.to_length_one(y, embeddings)
        return embeddings
