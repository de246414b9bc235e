"""What a step does between its matrix products, as one interface with two implementations.

`twin.TorchKernel` is the obvious one, in plain torch: the reference, and what serves on a GPU or without a compiler.
`native.NativeKernel` is the fast one and is tested against it.

S users of a plan, T tokens, R rows of a layer, Q rows with output, H heads, G key/value heads, K head size, W window,
D model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from encoder.inference.plan import Int64s, Plan
from encoder.model import EncoderConfig, TimeEncoding


@dataclass(frozen=True, slots=True)
class Precision:
    """The types of products and cache; norms, softmax, residuals and the embedding are float32 in any case."""

    products: torch.dtype = torch.float32
    cache: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the attention of an encoder looks like."""

    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...]
    rows: torch.dtype
    """Of what products read and write."""
    cells: torch.dtype
    """Of the keys and values that slabs hold."""

    @staticmethod
    def of(config: EncoderConfig, precision: Precision) -> Geometry:
        return Geometry(
            config.heads, config.kv_heads, config.head_dim, config.windows, precision.products, precision.cache
        )


class Kernel(Protocol):
    """Slabs of keys, values and event times for a fixed number of slots, and the operations of a step."""

    def begin(self, plan: Plan, times_ms: Int64s) -> None:
        """Announce the plan of the next step; `times_ms` [T] are the event times of its tokens."""

    def attend(self, layer: int, qkv: Tensor, out: Tensor) -> None:
        """Store the keys and values of rows `qkv` [R, (H + 2 G) K]; write what the rows with output mix, [Q, H K]."""

    def add_norm(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm, out: Tensor) -> None:
        """x += y in float32 and in place, then out = norm(x); all [R, D]."""

    def gelu(self, x: Tensor) -> None:
        """The tanh form of GELU, in place."""

    def encode_times(self, encoding: TimeEncoding, time_ms: Tensor, out: Tensor) -> None:
        """out = encoding(time_ms), [R, 2P + 1] of int64 [R]; the rows of `out` may lie apart."""

    def to_length_one(self, x: Tensor, out: Tensor) -> None:
        """out = x / |x| in float32, both [R, E]; NaN where x has one."""
