"""The operations of a forward pass between its matrix products: one interface with two implementations.

`reference.TorchKernel` is the obvious one, in plain torch: the reference, and the one that serves on a GPU or without a
compiler. `native.NativeKernel` is the fast one and is tested against it.

Shapes: S users of a plan, T tokens, R rows of a layer, Q rows with output, H heads, G key/value heads, K head size,
W window, D model, E embedding, P periods of a time encoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from encoder.arrays import I64
from encoder.inference.plan import Plan
from encoder.model import EncoderConfig, TimeEncoding


@dataclass(frozen=True, slots=True)
class Precision:
    """The types of products and cache; norms, softmax, residuals and the embedding are always float32."""

    products: torch.dtype = torch.float32
    cache: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shapes and types of an encoder's attention."""

    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...]
    rows: torch.dtype
    """Type of the rows that products read and write."""
    cells: torch.dtype
    """Type of the cached keys and values."""

    @staticmethod
    def of(config: EncoderConfig, precision: Precision) -> Geometry:
        """Return the geometry of an encoder whose products and cache have this precision."""
        return Geometry(
            config.heads, config.kv_heads, config.head_dim, config.windows, precision.products, precision.cache
        )


class Kernel(Protocol):
    """Slabs of keys, values and event times for a fixed number of slots, and the operations of a forward pass."""

    def begin(self, plan: Plan, times_ms: I64) -> None:
        """Begin a pass over the tokens of `plan`, whose event times are `times_ms` [T]."""

    def attend(self, layer: int, qkv: Tensor, out: Tensor) -> None:
        """Store the keys and values of rows `qkv` [R, (H + 2 G) K], and write attention to `out` [Q, H K]."""

    def add_norm(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm, out: Tensor) -> None:
        """Compute x += y in float32 and in place, then out = norm(x); all [R, D]."""

    def gelu(self, x: Tensor) -> None:
        """Apply the tanh form of GELU in place."""

    def encode_times(self, encoding: TimeEncoding, time_ms: Tensor, out: Tensor) -> None:
        """Write encoding(time_ms) of int64 [R] to `out` [R, 2 P + 1], whose rows may have gaps between them."""

    def to_length_one(self, x: Tensor, out: Tensor) -> None:
        """Compute out = x / |x| in float32, both [R, E]; a row with a NaN becomes NaN."""
