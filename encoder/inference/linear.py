"""A linear layer for serving: weights laid out once, in the type that products run in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Product = Callable[[Tensor, Tensor], Tensor]
"""From rows [R, in] and a buffer [R, out] to products [R, out], which may or may not lie in the buffer."""


def prepared(linear: nn.Linear, dtype: torch.dtype) -> Product:
    """The layer as a function, by the fastest way that this machine has for the type."""
    weight, bias = linear.weight.detach().to(dtype), linear.bias.detach().to(dtype)
    if dtype is torch.float32:
        return _transposed(weight, bias)
    return _packed(weight, bias) or (lambda x, out: F.linear(x, weight, bias))


def _transposed(weight: Tensor, bias: Tensor) -> Product:
    """[in, out] in memory: as fast as anything packed in float32, and it writes into the caller's buffer."""
    laid_out = weight.t().contiguous()
    return lambda x, out: torch.addmm(bias, x, laid_out, out=out)


def _packed(weight: Tensor, bias: Tensor) -> Product | None:
    """oneDNN's blocked layout, through operators that torch keeps private; None where they are missing or refuse."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 256)
        run = torch.ops.mkldnn._linear_pointwise
        run(torch.zeros(2, weight.shape[1], dtype=weight.dtype), packed, bias, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return lambda x, out: run(x, packed, bias, "none", [], "")
