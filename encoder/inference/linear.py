"""A linear layer for serving: weights laid out once, in the type that products run in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

InPlace = Callable[[Tensor], None]
Product = Callable[[Tensor, Tensor], Tensor]
"""From rows [R, in] and a buffer [R, out] to products [R, out], which may or may not lie in the buffer."""


def prepared(linear: nn.Linear, dtype: torch.dtype, *, gelu: InPlace | None = None) -> Product:
    """The layer as a function, by the fastest way that this machine has for the type.

    With `gelu`, the tanh form in place, the layer is followed by it; where the product can do that itself, it does.
    """
    weight, bias = linear.weight.detach().to(dtype), linear.bias.detach().to(dtype)
    if weight.device.type == "cuda":
        return _followed(lambda x, out: F.linear(x, weight, bias), gelu)
    if dtype is torch.float32:
        return _followed(_transposed(weight, bias), gelu)
    packed = _packed(weight, bias, ("none", [], "") if gelu is None else ("gelu", [], "tanh"))
    return packed or _followed(lambda x, out: F.linear(x, weight, bias), gelu)


def _followed(product: Product, gelu: InPlace | None) -> Product:
    if gelu is None:
        return product

    def both(x: Tensor, out: Tensor) -> Tensor:
        out = product(x, out)
        gelu(out)
        return out

    return both


def _transposed(weight: Tensor, bias: Tensor) -> Product:
    """[in, out] in memory: as fast as anything packed in float32, and it writes into the caller's buffer."""
    laid_out = weight.t().contiguous()
    return lambda x, out: torch.addmm(bias, x, laid_out, out=out)


def _packed(weight: Tensor, bias: Tensor, activation: tuple[str, list[Any], str]) -> Product | None:
    """oneDNN's blocked layout, through operators that torch keeps private; None where they are missing or refuse."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 256)
        run = torch.ops.mkldnn._linear_pointwise
        run(torch.zeros(2, weight.shape[1], dtype=weight.dtype), packed, bias, *activation)
    except (AttributeError, RuntimeError):
        return None
    return lambda x, out: run(x, packed, bias, *activation)
