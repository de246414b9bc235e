"""Encoders of action sequences: PinnerFormer as published, and a streaming encoder that never recomputes an output.

Both read `Features` [B, L], oldest first and padded at the end, and return a vector of length one at every position;
the vector at the newest position is the user's embedding. Token by token, `StreamingEncoder.embed` is

    x = inputs(features);  for block in blocks: q, k, v = block.project(x, rope); x = block.finish(x, mixed)
    embedding = head(x)        where mixed = attend(q, k and v of the last W positions)

so a caller that keeps the last W keys, values and event times of each layer can extend a user by one token with the
same weights. The architecture is that of Pancha et al., "PinnerFormer: Sequence Modeling for User Representation at
Pinterest" (KDD 2022, arXiv 2205.04507), with the changes that `StreamingEncoder` documents.

Shapes: B users, L actions, D model, E embedding, V item vector, H query heads, G key/value heads, K head size,
I items, W window, P periods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoder.attention import apply_rope, attend_window, rope_at
from encoder.features import Features
from encoder.items import ItemVectors

HOUR_MS = 3_600_000
ABSOLUTE_PERIODS_MS = tuple(
    round(hours * HOUR_MS) for hours in (0.25, 0.5, 0.75, 1, 2, 4, 8, 16, 24, 7 * 24, 28 * 24, 365 * 24)
)
"""PinnerFormer's 12 absolute periods, from 15 minutes to one year (arXiv 2205.04507, appendix A.1)."""
RELATIVE_PERIODS_MS = tuple(1_000 * math.exp(i / 31 * math.log(28 * 24 * 3_600)) for i in range(32))
"""PinnerFormer's 32 relative periods, from one second to four weeks, evenly spaced on a log scale."""
Dropout = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Kind and sizes of an encoder; the constructor reports all problems at once in a `ValueError`."""

    kind: Literal["streaming", "window"] = "streaming"
    d_model: int = 256
    heads: int = 8
    kv_heads: int = 2
    windows: tuple[int, ...] = (64, 64, 64, 64)
    """Window W of each layer: a query attends to itself and to the W - 1 positions before it."""
    embedding_dim: int = 256
    item_dim: int = 256
    action_dim: int = 16
    surface_dim: int = 8
    sequence_length: int = 256
    """Length M: an embedding is a function of the last M actions."""
    time_bias: bool = True
    """Whether attention logits decrease with event-time distance, by a learned slope per head and layer."""
    read_out: bool = False
    """Whether the time of the request can enter after the last layer, by `StreamingEncoder.read_out`."""
    item_tower: Literal["identity", "mlp"] = "mlp"
    normalize_items: bool = True
    """Whether item embeddings have length one, as published; otherwise their length can express popularity."""

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("encoder configuration is inconsistent: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        sizes = ("d_model", "heads", "kv_heads", "embedding_dim", "item_dim", "action_dim", "surface_dim")
        small = [f"{name} must be at least 1" for name in (*sizes, "sequence_length") if getattr(self, name) < 1]
        if small or not self.windows or min(self.windows) < 1:
            return [*small, "windows needs one entry of at least 1 per layer"]
        checks = (
            (self.d_model % (2 * self.heads) == 0, "d_model must be a multiple of twice the heads"),
            (self.heads % self.kv_heads == 0, "heads must be a multiple of kv_heads"),
            (self.item_tower == "mlp" or self.item_dim == self.embedding_dim, "an identity item tower needs V = E"),
            (self.kind != "window" or set(self.windows) == {self.sequence_length}, "a window encoder's windows are M"),
            (self.kind != "window" or not (self.time_bias or self.read_out), "time_bias and read_out need streaming"),
            (self.kind != "streaming" or sum(self.windows) <= self.sequence_length, "windows must sum to at most M"),
            (
                self.kind != "streaming" or self.receptive_field < self.sequence_length,
                "the oldest token's gap needs one action more than the receptive field: make the window smaller",
            ),
        )
        return [text for holds, text in checks if not holds]

    @property
    def head_dim(self) -> int:
        """Head size K."""
        return self.d_model // self.heads

    @property
    def receptive_field(self) -> int:
        """Number of positions that the output at a position depends on, including itself.

        Each layer adds the W - 1 positions before: sum(W - 1) + 1.
        """
        return sum(window - 1 for window in self.windows) + 1

    @property
    def actions_needed(self) -> int:
        """Number of newest actions that a caller has to keep, so that an embedding never depends on what is cached.

        A streaming encoder needs one action before its receptive field, because the time since it is a feature.
        """
        return min(self.receptive_field + (self.kind == "streaming"), self.sequence_length)


class TimeEncoding(nn.Module):
    """Encodes a time t as [..., 2P + 1]: cosine and sine of each fixed period with a learned phase, and a logarithm.

        [ cos(2 pi t / p_i + phase_0i) ... , sin(2 pi t / p_i + phase_1i) ... , log(1 + t) - log_origin ]

    This is PinnerFormer's appendix A.1 (arXiv 2205.04507), with log(1 + t) so that t = 0 stays finite. Times are int64
    milliseconds and are reduced modulo the period in float64, so an epoch time keeps its sub-second phase.
    """

    periods_ms: Tensor

    def __init__(self, periods_ms: tuple[float, ...], *, log_origin: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("periods_ms", torch.tensor(periods_ms, dtype=torch.float64), persistent=False)
        self.phases = nn.Parameter(torch.zeros(2, len(periods_ms)))
        self.log_origin = log_origin
        self.width = 2 * len(periods_ms) + 1

    def forward(self, time_ms: Tensor) -> Tensor:
        """Return the encodings [..., 2P + 1] of times [...]."""
        time = time_ms.clamp(min=0).double().unsqueeze(-1)  # [..., 1]
        angle = (torch.remainder(time, self.periods_ms) * (2 * math.pi / self.periods_ms)).float()  # [..., P]
        log_s = (torch.log1p(time / 1_000) - self.log_origin).float()
        return torch.cat([torch.cos(angle + self.phases[0]), torch.sin(angle + self.phases[1]), log_s], dim=-1)


class Block(nn.Module):
    """A pre-norm transformer layer in two halves, before and after attention, so that keys and values can be cached."""

    slope: nn.Parameter | None

    def __init__(self, config: EncoderConfig, window: int) -> None:
        super().__init__()
        d, k = config.d_model, config.head_dim
        self.heads, self.kv_heads, self.head_dim, self.window = config.heads, config.kv_heads, k, window
        self.norm_attention = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, (config.heads + 2 * config.kv_heads) * k)
        self.slope = nn.Parameter(torch.zeros(config.heads)) if config.time_bias else None
        self.out = nn.Linear(d, d)
        self.norm_ffn = nn.LayerNorm(d)
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [..., H, K], keys and values [..., G, K]; `rope` rotates queries and keys."""
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (-1, self.head_dim))  # [..., H + 2 G, K]
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        if rope is None:
            return q, k, v
        return apply_rope(q, rope), apply_rope(k, rope), v

    def finish(self, x: Tensor, mixed: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return the output [..., D] of the layer from its input [..., D] and the attention output [..., H, K]."""
        x = x + _drop(self.out(mixed.flatten(-2)), dropout)
        return x + _drop(self.down(F.gelu(self.up(self.norm_ffn(x)), approximate="tanh")), dropout)


class Head(nn.Module):
    """The output layer at every position: LayerNorm, Linear, GELU, Linear, scaling to length one."""

    def __init__(self, d_model: int, embedding_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, 4 * d_model)
        self.down = nn.Linear(4 * d_model, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings [..., E] of hidden states [..., D]."""
        return F.normalize(self.down(F.gelu(self.up(self.norm(x)), approximate="tanh")), dim=-1)


class Encoder(nn.Module):
    """The common part of both encoders: inputs, head and item tower."""

    def __init__(self, config: EncoderConfig, items: ItemVectors, *, actions: int, surfaces: int) -> None:
        super().__init__()
        self.config = config
        self.items: ItemVectors = items
        self.action = nn.Parameter(torch.zeros(actions + 1, config.action_dim))
        self.surface = nn.Parameter(torch.zeros(surfaces + 1, config.surface_dim))
        self.clock = TimeEncoding(ABSOLUTE_PERIODS_MS, log_origin=math.log(1e9))
        self.gap = TimeEncoding(RELATIVE_PERIODS_MS)
        width = config.item_dim + config.action_dim + config.surface_dim + 1 + self.clock.width + self.gap.width
        self.project = nn.Linear(width + self._extra_width(), config.d_model)
        self.blocks = nn.ModuleList(Block(config, window) for window in config.windows)
        self.head = Head(config.d_model, config.embedding_dim)
        self.item_tower = item_tower(config)

    @property
    def layers(self) -> list[Block]:
        """The blocks, from first to last."""
        return cast(list[Block], list(self.blocks))

    @property
    def device(self) -> torch.device:
        """Device of the parameters; features must be on it."""
        return self.action.device

    def _extra_width(self) -> int:
        return 0

    def lookup_columns(self, features: Features) -> list[Tensor]:
        """Return the first columns that `project` reads: table rows of item, action and surface, and the duration."""
        duration = torch.log1p(features.duration_ms.float() / 1_000).unsqueeze(-1)
        return [
            self.items(features.item),
            F.embedding(features.action, self.action),
            F.embedding(features.surface, self.surface),
            duration,
        ]

    def time_columns(self, features: Features) -> list[tuple[TimeEncoding, Tensor]]:
        """Return the time encodings of the columns that follow, each with the times [...] that it encodes."""
        return [(self.clock, features.time_ms), (self.gap, features.gap_ms)]

    def _columns(self, features: Features) -> list[Tensor]:
        return [
            *self.lookup_columns(features),
            *(encoding(time_ms) for encoding, time_ms in self.time_columns(features)),
        ]

    def item_embeddings(self) -> Tensor:
        """Return the item embeddings [I + 1, E]; row 0 is the unknown item. The score of a user is the dot product."""
        embedded: Tensor = self.item_tower(self.items.table())
        return F.normalize(embedded, dim=-1) if self.config.normalize_items else embedded


class StreamingEncoder(Encoder):
    """A causal encoder with a sliding window in each layer; the output for an action never changes.

    Unlike in PinnerFormer, positions are relative (rope) instead of learned, the time since the newest action is not an
    input, and attention is limited to the last W positions. The output at a position therefore depends on the last
    `config.receptive_field` actions and on nothing else.
    """

    def __init__(self, config: EncoderConfig, items: ItemVectors, *, actions: int, surfaces: int) -> None:
        super().__init__(config, items, actions=actions, surfaces=surfaces)
        self.since = TimeEncoding(RELATIVE_PERIODS_MS) if config.read_out else None
        self.modulate = nn.Linear(2 * len(RELATIVE_PERIODS_MS) + 1, 2 * config.d_model) if config.read_out else None

    def inputs(self, features: Features) -> Tensor:
        """Return tokens [..., D]; each depends on its own row of features only."""
        projected: Tensor = self.project(torch.cat(self._columns(features), dim=-1))
        return projected

    def forward(self, features: Features, lengths: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return hidden states [B, L, D] of padded sequences [B, L]; values at padding are meaningless.

        `lengths` is not used here, because padding comes after every action and attention is causal.
        """
        x = _drop(self.inputs(features), dropout)
        rope = rope_at(features.position, self.config.head_dim)
        for block in self.layers:
            q, k, v = block.project(x, rope)
            x = block.finish(x, attend_window(q, k, v, features.time_ms, block.window, block.slope), dropout)
        return x

    def read_out(self, hidden: Tensor, since_ms: Tensor) -> Tensor:
        """Return hidden states [..., D] for a request `since_ms` [...] after their action (FiLM, arXiv 1709.07871)."""
        if self.since is None or self.modulate is None:
            raise ValueError("this encoder has no read-out: train it with read_out = true")
        modulation: Tensor = self.modulate(self.since(since_ms))
        scale, shift = modulation.chunk(2, dim=-1)
        return hidden * (1 + scale) + shift

    def embed(self, features: Features, lengths: Tensor) -> Tensor:
        """Return the embedding [B, E] of each user: the head at the newest position."""
        embedding: Tensor = self.head(newest(self(features, lengths), lengths))
        return embedding


class WindowEncoder(Encoder):
    """PinnerFormer as published, with learned positions counted from the newest action and the time since it.

    The paper orders actions newest first; here rows are oldest first, as everywhere else. Row r of the paper is
    position `lengths - 1 - r`, and its attention to "itself and older" is the causal mask:

        position        0   1   2   3   (padding)        lengths = 4
        row in paper    3   2   1   0
    """

    def __init__(self, config: EncoderConfig, items: ItemVectors, *, actions: int, surfaces: int) -> None:
        super().__init__(config, items, actions=actions, surfaces=surfaces)
        self.age = TimeEncoding(RELATIVE_PERIODS_MS)
        self.positions = nn.Parameter(torch.zeros(config.sequence_length, config.d_model))

    def _extra_width(self) -> int:
        return 2 * len(RELATIVE_PERIODS_MS) + 1

    def inputs(self, features: Features, lengths: Tensor) -> Tensor:
        """Return tokens [B, L, D]; each depends on the newest action, so none can be cached."""
        age_ms = newest(features.time_ms, lengths).unsqueeze(-1) - features.time_ms
        rank = (lengths.unsqueeze(-1) - 1 - torch.arange(features.item.shape[-1], device=lengths.device)).clamp(
            min=0
        )  # [B, L]
        columns = [*self._columns(features), self.age(age_ms)]
        projected: Tensor = self.project(torch.cat(columns, dim=-1))
        return projected + F.embedding(rank, self.positions)

    def forward(self, features: Features, lengths: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return hidden states [B, L, D] of padded sequences [B, L], with L at most M."""
        x = _drop(self.inputs(features, lengths), dropout)
        for block in self.layers:
            q, k, v = block.project(x, None)
            x = block.finish(x, attend_window(q, k, v, features.time_ms, block.window, None), dropout)
        return x

    def embed(self, features: Features, lengths: Tensor) -> Tensor:
        """Return the embedding [B, E] of each user."""
        embedding: Tensor = self.head(newest(self(features, lengths), lengths))
        return embedding


AnyEncoder = StreamingEncoder | WindowEncoder


def build_encoder(config: EncoderConfig, items: ItemVectors, *, actions: int, surfaces: int) -> AnyEncoder:
    """Return the encoder of a configuration; its weights are zero until `initialize` or a release fills them."""
    kind = StreamingEncoder if config.kind == "streaming" else WindowEncoder
    return kind(config, items, actions=actions, surfaces=surfaces)


def item_tower(config: EncoderConfig) -> nn.Module:
    """Return the map [..., V] -> [..., E] from item vectors to embeddings: PinnerFormer's MLP or the identity."""
    if config.item_tower == "identity":
        return nn.Identity()
    width = 4 * config.embedding_dim
    return nn.Sequential(nn.Linear(config.item_dim, width), nn.GELU("tanh"), nn.Linear(width, config.embedding_dim))


def initialize(encoder: AnyEncoder, generator: torch.Generator, item_table: Tensor | None = None) -> None:
    """Initialize every parameter, by this table.

    | parameter | value |
    | --- | --- |
    | trained item vectors | `item_table` [I + 1, V] if given, else normal, std 0.02 |
    | action, surface, position and other item tables | normal, std 0.02 |
    | LayerNorm | weight 1, bias 0 |
    | `project`, columns of item vectors | normal, scaled so that items contribute a variance of 1 to each input |
    | `project`, other columns | normal, scaled so that together they contribute a variance of at most 0.3^2 |
    | Linear that adds to the residual (`out`, `down` of a block), `modulate` | weight 0 |
    | other Linear | normal, std 1 / sqrt(inputs) |
    | Linear biases, time phases, importance of n-grams | 0 |
    | slopes of the time bias | -2 for the first head rising to 1 for the last |

    Items get their own scale because the time encodings are about a hundred columns of magnitude one, while item
    vectors are small at first: with equal weights, items would have almost no influence for the first million tokens.
    """
    residual = {id(weight) for block in encoder.layers for weight in (block.out.weight, block.down.weight)}
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(("bias", "phases", "importance")) or id(parameter) in residual or "modulate" in name:
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            elif name.endswith("slope"):
                parameter.copy_(torch.linspace(-2, 1, len(parameter)))
            elif name.startswith(("items.", "action", "surface", "positions")):
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        if item_table is not None:
            encoder.items.table().copy_(item_table)
        _balance_inputs(encoder)


def _balance_inputs(encoder: AnyEncoder) -> None:
    """Scale the columns of `project`, whose standard deviation is width^-0.5, to the variances of the table above."""
    items = encoder.config.item_dim
    weight = encoder.project.weight
    weight[:, :items] *= math.sqrt(weight.shape[1] / items) / encoder.items.table().std()
    weight[:, items:] *= 0.3 * math.sqrt(weight.shape[1] / (weight.shape[1] - items))


def newest(values: Tensor, lengths: Tensor) -> Tensor:
    """Return the values [B, ...] at the newest position, lengths - 1, of each sequence [B, L, ...]."""
    return values[torch.arange(len(lengths), device=values.device), lengths - 1]


def _drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    return x if dropout is None else dropout(x)
