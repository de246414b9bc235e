"""One step: the new tokens of some users through every layer, against their cached keys and values, to embeddings.

The same weights and the same functions as the model's own forward pass (`encoder.model`), taken apart so that only
the rows that a plan names are computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32
from encoder.features import Features
from encoder.inference.kernel import Kernel
from encoder.inference.linear import prepared
from encoder.inference.plan import Int64s, LayerRows, offsets_of, plan_tokens, suffixes
from encoder.inference.transfer import sent
from encoder.model import Block, Head, StreamingEncoder
from encoder.release import Release


class Steps:
    """Runs steps of one release over the slots of one kernel, with products in `dtype`. One thread."""

    def __init__(self, release: Release, kernel: Kernel, dtype: torch.dtype) -> None:
        model = release.model
        if not isinstance(model, StreamingEncoder):
            raise TypeError("a window encoder computes nothing that could be kept; load it with kind full")
        self.windows = model.config.windows
        self.dtype = str(dtype).removeprefix("torch.")
        self._tokenizer = release.tokenizer
        self._input = _Input(model, kernel, dtype)
        self._kernel = kernel
        self.buffers = Buffers(dtype, model.device)
        self._layers = [_Layer(block, kernel, dtype) for block in model.layers]
        self._head = _Head(model.head, kernel, dtype)

    @torch.inference_mode()
    def run(self, batch: SequenceBatch, users: Int64s, slots: Int64s, fresh: Int64s, firsts: Int64s) -> F32:
        """Embeddings [S, E] of `users` [S], indices into the batch, after their newest `fresh` [S] actions.

        `slots` [S] hold what came before, counted from position `firsts` [S]; they hold the new tokens afterwards.
        """
        plan = plan_tokens(slots, batch.counts[users], fresh, firsts, self.windows)
        features = self._features(batch, users, fresh, plan.positions)
        self._kernel.begin(plan, features.time_ms.numpy())
        return self.embed(features, plan.layers, self.buffers).numpy()

    def embed(self, features: Features, layers: Sequence[LayerRows], buffers: Buffers) -> Tensor:
        """Embeddings [S, E] from the features of the new tokens, once the kernel knows the plan."""
        x, y = self._input.run(features, buffers), None
        for number, (layer, rows) in enumerate(zip(self._layers, layers, strict=True)):
            x, y = layer.run(number, x, y, rows.kept, buffers)
        return self._head.run(x, y, buffers)

    def _features(self, batch: SequenceBatch, users: Int64s, fresh: Int64s, positions: Int64s) -> Features:
        """Features of the new tokens alone; the action before them is read too where it is kept, for the gap."""
        ends = batch.starts[users + 1]
        known = np.minimum(fresh + 1, ends - batch.starts[users])
        rows = np.repeat(ends - np.cumsum(known), known) + np.arange(known.sum())
        starts = offsets_of(known)
        wanted = suffixes(starts, fresh)
        return self._tokenizer.tokenize(batch.actions.take(rows), starts, positions, wanted).features()


class Buffers:
    """Scratch memory by name, reused from step to step; contents never survive a step."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._held: dict[tuple[str, int], Tensor] = {}
        self._views: dict[tuple[str, int, int], Tensor] = {}  # slicing anew is a microsecond each

    def take(self, name: str, rows: int, width: int) -> Tensor:
        """[rows, width], uninitialised."""
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
        """Fill everything with NaN: what a step did not write itself must not show in its result."""
        for held in self._held.values():
            held.fill_(float("nan"))


class _Input:
    """The model's `inputs`; a token is a row of scratch memory until it is projected."""

    def __init__(self, model: StreamingEncoder, kernel: Kernel, dtype: torch.dtype) -> None:
        self._model, self._kernel = model, kernel
        self._project = prepared(model.project, dtype)
        self._width, self._out = model.project.in_features, model.project.out_features

    def run(self, features: Features, buffers: Buffers) -> Tensor:
        """Tokens [R, D] in float32."""
        rows = len(features.item)
        columns = buffers.take("columns", rows, self._width)
        at = 0
        for values in self._model.looked_up(features):
            columns[:, at : at + values.shape[1]] = values
            at += values.shape[1]
        for encoding, time_ms in self._model.timed(features):
            self._kernel.encode_times(encoding, time_ms, columns[:, at : at + encoding.width])
            at += encoding.width
        return self._project(columns, buffers.take("input", rows, self._out)).float()


class _FeedForward:
    """Linear, GELU, Linear."""

    def __init__(self, up: nn.Linear, down: nn.Linear, kernel: Kernel, dtype: torch.dtype) -> None:
        self._up, self._down = prepared(up, dtype, gelu=kernel.gelu), prepared(down, dtype)
        self._width, self._out = up.out_features, down.out_features

    def run(self, x: Tensor, buffers: Buffers) -> Tensor:
        wide = self._up(x, buffers.take("wide", x.shape[0], self._width))
        return self._down(wide, buffers.take("down", x.shape[0], self._out))


class _Layer:
    """A `Block` over cached keys and values."""

    def __init__(self, block: Block, kernel: Kernel, dtype: torch.dtype) -> None:
        self._kernel = kernel
        self._norms = block.norm_attention, block.norm_ffn
        self._qkv, self._out = prepared(block.qkv, dtype), prepared(block.out, dtype)
        self._qkv_width = block.qkv.out_features
        self._ffn = _FeedForward(block.up, block.down, kernel, dtype)

    def run(self, number: int, x: Tensor, y: Tensor | None, kept: Int64s | None, buffers: Buffers) -> _Pair:
        """The residual x [R, D] and what is still to be added to it, y, become those of the rows kept [Q, D]."""
        normed = buffers.take("normed", *x.shape)
        self._kernel.add_norm(x, y, self._norms[0], normed)
        qkv = self._qkv(normed, buffers.take("qkv", x.shape[0], self._qkv_width))
        if kept is not None:
            x = x[sent(x.device, kept)[0]]
        mixed = buffers.take("mixed", *x.shape)
        self._kernel.attend(number, qkv, mixed)
        added = self._out(mixed, buffers.take("added", *x.shape))
        normed = buffers.take("normed", *x.shape)
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
        normed = buffers.take("normed", *x.shape)
        self._kernel.add_norm(x, y, self._norm, normed)
        y = self._ffn.run(normed, buffers)
        embeddings = torch.empty(y.shape, device=y.device)
        self._kernel.to_length_one(y, embeddings)
        return embeddings
