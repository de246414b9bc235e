"""A linear layer for serving: its weights are laid out once, in the type that products run in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

InPlace = Callable[[Tensor], None]
Product = Callable[[Tensor, Tensor], Tensor]
"""Function of rows [R, in] and a buffer [R, out] that returns products [R, out], in the buffer or elsewhere."""


def prepare_linear(linear: nn.Linear, dtype: torch.dtype, *, gelu: InPlace | None = None) -> Product:
    """Return the layer as a function, by the fastest way that this machine has for the type.

    `gelu` applies the tanh form in place and follows the layer; it is fused into the product where that is possible.
    """
    weight, bias = linear.weight.detach().to(dtype), linear.bias.detach().to(dtype)
    if weight.device.type == "cuda":
        return _then(lambda x, out: F.linear(x, weight, bias), gelu)
    if dtype is torch.float32:
        return _then(_transposed(weight, bias), gelu)
    packed = _packed(weight, bias, ("none", [], "") if gelu is None else ("gelu", [], "tanh"))
    return packed or _then(lambda x, out: F.linear(x, weight, bias), gelu)


def _then(product: Product, gelu: InPlace | None) -> Product:
    if gelu is None:
        return product

    def both(x: Tensor, out: Tensor) -> Tensor:
        out = product(x, out)
        gelu(out)
        return out

    return both


def _transposed(weight: Tensor, bias: Tensor) -> Product:
    """Lay the weight out as [in, out]: as fast as any packing in float32, and it writes into the caller's buffer."""
    laid_out = weight.t().contiguous()
    return lambda x, out: torch.addmm(bias, x, laid_out, out=out)


def _packed(weight: Tensor, bias: Tensor, activation: tuple[str, list[Any], str]) -> Product | None:
    """Use oneDNN's blocked layout through private operators of torch; None where they are missing or fail."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 256)
        run = torch.ops.mkldnn._linear_pointwise
        run(torch.zeros(2, weight.shape[1], dtype=weight.dtype), packed, bias, *activation)
    except (AttributeError, RuntimeError):
        return None
    return lambda x, out: run(x, packed, bias, *activation)
