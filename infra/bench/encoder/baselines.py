"""Baselines of the encoder runtime: the bare matrix products of a token, and full passes over 256 actions.

Each baseline is a function that does one piece of work and returns how many users it has served.

Shapes: B users, M actions, D model, H heads, G key/value heads, K head size.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from encoder.inference.incremental import TOKENS_MAX as BATCH_USERS
from encoder.inference.linear import prepare_linear
from encoder.model import EncoderConfig
from encoder.release import Release


class Products:
    """The matrix products of one token per user for a batch of users, and nothing between them."""

    def __init__(self, release: Release, dtype: torch.dtype) -> None:
        model = release.model
        layers = [linear for block in model.layers for linear in (block.qkv, block.out, block.up, block.down)]
        linears = [model.project, *layers, model.head.up, model.head.down]
        self.flops = sum(2 * linear.in_features * linear.out_features for linear in linears)
        self._calls = [
            (
                prepare_linear(linear, dtype),
                torch.randn(BATCH_USERS, linear.in_features).to(dtype),
                torch.empty(BATCH_USERS, linear.out_features, dtype=dtype),
            )
            for linear in linears
        ]

    @torch.inference_mode()
    def step(self) -> int:
        """Run the products of one batch and return its number of users."""
        for product, rows, out in self._calls:
            product(rows, out)
        return BATCH_USERS


def torch_encoder(config: EncoderConfig) -> nn.TransformerEncoder:
    """Return torch's own encoder of the size of `config`, pre-norm, without dropout."""
    layer = nn.TransformerEncoderLayer(
        config.d_model,
        config.heads,
        4 * config.d_model,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    return nn.TransformerEncoder(layer, len(config.windows), enable_nested_tensor=False).eval()


def transformer_encoder(config: EncoderConfig, users: int) -> Callable[[], int]:
    """Return a causal full pass of torch's own encoder over full sequences, in float32."""
    encoder = torch_encoder(config)
    x = torch.randn(users, config.sequence_length, config.d_model)  # [B, M, D]
    mask = nn.Transformer.generate_square_subsequent_mask(config.sequence_length)

    @torch.inference_mode()
    def step() -> int:
        encoder(x, mask=mask, is_causal=True)
        return users

    return step


def plain_pass(config: EncoderConfig, dtype: torch.dtype) -> Callable[[], int]:
    """Return a full pass over one full sequence: every position in every layer, with scaled_dot_product_attention."""
    d, heads = config.d_model, config.heads
    kv = config.kv_heads * config.head_dim
    layers = [
        nn.ModuleList(
            [nn.LayerNorm(d), nn.Linear(d, d + 2 * kv), nn.Linear(d, d), nn.LayerNorm(d), nn.Linear(d, 4 * d)]
        )
        .append(nn.Linear(4 * d, d))
        .to(dtype)
        for _ in config.windows
    ]
    start = torch.randn(1, config.sequence_length, d).to(dtype)  # [1, M, D]

    @torch.inference_mode()
    def step() -> int:
        x = start
        for norm, qkv, out, norm_ffn, up, down in layers:
            parts = (
                qkv(norm(x)).view(1, config.sequence_length, -1, config.head_dim).transpose(1, 2)
            )  # [1, H + 2 G, M, K]
            q, k, v = torch.split(parts, [heads, config.kv_heads, config.kv_heads], dim=1)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # [1, H, M, K]
            x = x + out(mixed.transpose(1, 2).flatten(2))
            x = x + down(F.gelu(up(norm_ffn(x)), approximate="tanh"))
        return 1

    return step


def peak_flops(dtype: torch.dtype) -> float:
    """Return this machine's FLOP per CPU second: the best of six timings of a large product."""
    linear = nn.Linear(1_024, 1_024)
    product = prepare_linear(linear, dtype)
    x, out = torch.randn(512, 1_024).to(dtype), torch.empty(512, 1_024, dtype=dtype)
    best = 0.0
    with torch.inference_mode():
        for _ in range(6):
            start = time.process_time()
            for _ in range(4):
                product(x, out)
            best = max(best, 4 * 2 * 512 * 1_024**2 / (time.process_time() - start))
    return best
