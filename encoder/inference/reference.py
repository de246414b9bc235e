"""The kernel in plain torch: nothing clever, so that the fast one has something to be measured against.

Each layer lays its ragged rows out as [S, longest], puts the W - 1 cached positions before each user's rows, and
attends under a mask. Shapes as in `kernel`; P is the longest number of rows. On a CUDA device it is the kernel that
serves: what is counted is counted on the host, so that no operation there waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoder.attention import apply_rope, log_minutes, rope_at
from encoder.hardware import CPU
from encoder.inference.kernel import Geometry
from encoder.inference.plan import Int64s, Plan, suffixes
from encoder.inference.transfer import sent
from encoder.model import TimeEncoding


class TorchKernel:
    """The reference kernel. `slopes` [L, H] are the non-negative slopes of the event-time bias, None without."""

    def __init__(self, geometry: Geometry, slots: int, slopes: Tensor | None, device: torch.device = CPU) -> None:
        g = geometry
        self.geometry = g
        self.slopes = slopes
        self.device = device
        self.keys = [torch.zeros(slots, w, g.kv_heads, g.head_dim, dtype=g.cells, device=device) for w in g.windows]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.times_ms = torch.zeros(slots, max(g.windows), dtype=torch.int64, device=device)

    @staticmethod
    def bytes_per_slot(geometry: Geometry) -> int:
        """Memory of one user, in bytes."""
        vectors = 2 * geometry.kv_heads * geometry.head_dim * sum(geometry.windows)
        return vectors * geometry.cells.itemsize + 8 * max(geometry.windows)

    def begin(self, plan: Plan, times_ms: Int64s) -> None:
        positions, times = sent(self.device, plan.positions, times_ms)
        self._begin(partial(_Block.of, plan, self.device), positions, times)

    def begin_single(self, slots: Tensor, offsets: Tensor, positions: Tensor, times_ms: Tensor) -> None:
        """`begin` for one new token of each user, from tensors [S] on the device alone: shapes depend on S only."""
        self._begin(partial(_Block.single, slots, offsets), positions, times_ms)

    def _begin(self, block_of: Callable[[int, int], _Block], positions: Tensor, times_ms: Tensor) -> None:
        self._block_of = block_of
        self._rotation = rope_at(positions, self.geometry.head_dim)
        block = block_of(0, self.times_ms.shape[1])
        self._token_ms = times_ms
        self._old_ms = block.cached(self.times_ms)
        block.store(self.times_ms, times_ms)

    def attend(self, layer: int, qkv: Tensor, out: Tensor) -> None:
        g = self.geometry
        block = self._block_of(layer, g.windows[layer])
        q, k, v = torch.split(qkv.view(len(qkv), -1, g.head_dim), [g.heads, g.kv_heads, g.kv_heads], dim=-2)
        cos, sin = self._rotation
        rotation = cos[block.tokens], sin[block.tokens]
        k = apply_rope(k.float(), rotation).to(g.cells)
        keys = block.join(block.cached(self.keys[layer]), k).float()
        values = block.join(block.cached(self.values[layer]), v.to(g.cells)).float()
        out.copy_(self._mix(layer, block, apply_rope(q.float(), rotation), keys, values)[block.kept])
        block.store(self.keys[layer], k)
        block.store(self.values[layer], v.to(g.cells))

    def add_norm(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm, out: Tensor) -> None:
        if y is not None:
            x += y
        out.copy_(norm(x))

    def gelu(self, x: Tensor) -> None:
        x.copy_(F.gelu(x.float(), approximate="tanh"))

    def encode_times(self, encoding: TimeEncoding, time_ms: Tensor, out: Tensor) -> None:
        out.copy_(encoding(time_ms))

    def to_length_one(self, x: Tensor, out: Tensor) -> None:
        out.copy_(F.normalize(x.float(), dim=-1))

    def _mix(self, layer: int, block: _Block, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Softmax attention of rows q [R, H, K] over keys and values [S, W - 1 + P, G, K]; [R, H K]."""
        g = self.geometry
        padded = block.pad(q)
        grouped = padded.view(*padded.shape[:2], g.kv_heads, -1, g.head_dim)
        logits = torch.einsum("sigjd,skgd->sgjik", grouped, keys) / g.head_dim**0.5
        if self.slopes is not None:
            logits -= self.slopes[layer].view(g.kv_heads, -1, 1, 1) * self._lags(block)[:, None, None]
        logits.masked_fill_(~block.visible[:, None, None], float("-inf"))
        weights = logits.softmax(-1).nan_to_num(0.0)  # rows of padding may see nothing
        mixed = torch.einsum("sgjik,skgd->sigjd", weights, values)
        return mixed.flatten(2)[block.users, block.within]

    def _lags(self, block: _Block) -> Tensor:
        """log(1 + minutes) from each key to each query, [S, P, W - 1 + P]."""
        new_ms = block.pad(self._token_ms[block.tokens])
        return log_minutes(new_ms, torch.cat([self._older_ms(block), new_ms], dim=1))

    def _older_ms(self, block: _Block) -> Tensor:
        """Event times of the W - 1 positions before each user's rows, [S, W - 1]; some may be tokens of this plan."""
        starts = block.starts[:, None]
        before = block.firsts[:, None] + torch.arange(1 - block.window, 0, device=starts.device)
        width = self._old_ms.shape[1]
        old = self._old_ms.gather(1, (before - starts + width).clamp(0, max(width - 1, 0))) if width else self._old_ms
        new = self._token_ms[before.clamp(min=0)]
        return torch.where(before >= starts, new, old)


@dataclass(slots=True)
class _Block:
    """Indices of one layer's rows: where each lies in the plan, in its user's ring, and which keys it may see."""

    window: int
    longest: int
    """P."""
    slots: Tensor
    """[S]."""
    starts: Tensor
    """[S] token of the plan that is the user's first."""
    firsts: Tensor
    """[S] token that is the user's first in this layer."""
    cached_until: Tensor
    """[S] offset of the plan's first token: a slot holds what lies before; what a cone left out was never written."""
    first_offsets: Tensor
    """[S] offset of the user's first row."""
    users: Tensor
    """[R]."""
    within: Tensor
    """[R] rows of the same user before it."""
    tokens: Tensor
    """[R]."""
    offsets: Tensor
    """[R]."""
    kept: Tensor
    """[Q] rows with output."""
    stay: Tensor
    """Rows that enter the ring: of more than a window's worth of a user's, the newest."""
    ring: Tensor = field(init=False)
    """[S, W - 1] places of the positions before the user's rows."""
    missing: Tensor = field(init=False)
    """[S, W - 1] positions that a slot does not hold."""
    visible: Tensor = field(init=False)
    """[S, P, W - 1 + P] whether a row sees a key."""

    def __post_init__(self) -> None:
        first = self.first_offsets[:, None]
        old = first + torch.arange(1 - self.window, 0, device=first.device)
        steps = first + torch.arange(self.longest, device=first.device)
        self.ring = old % self.window
        self.missing = (old < 0) | (old >= self.cached_until[:, None])
        keys = torch.cat([old, steps], dim=1)
        behind = steps[..., None] - keys[:, None]
        self.visible = (behind >= 0) & (behind < self.window) & (keys >= 0)[:, None]

    @classmethod
    def of(cls, plan: Plan, device: torch.device, layer: int, window: int) -> _Block:
        rows = plan.layers[layer]
        lengths = np.diff(rows.starts)
        users = np.repeat(np.arange(len(lengths)), lengths)
        within = np.arange(len(users)) - rows.starts[users]
        tokens = rows.tokens[users] + within
        columns = (
            plan.slots,
            plan.starts[:-1],
            rows.tokens,
            plan.offsets[plan.starts[:-1]],
            plan.offsets[rows.tokens],
            users,
            within,
            tokens,
            plan.offsets[tokens],
            np.arange(len(users)) if rows.kept is None else rows.kept,
            suffixes(rows.starts, np.minimum(lengths, window)),
        )
        return cls(window, int(lengths.max()), *sent(device, *columns))

    @classmethod
    def single(cls, slots: Tensor, offsets: Tensor, layer: int, window: int) -> _Block:
        """Of users with one row each, the same in all layers."""
        every = torch.arange(len(slots), device=slots.device)
        none = torch.zeros_like(every)
        return cls(window, 1, slots, every, every, offsets, offsets, every, none, every, offsets, every, every)

    def cached(self, slab: Tensor) -> Tensor:
        """What a slab [slots, W, ...] holds of the W - 1 positions before each user's rows, 0 elsewhere."""
        missing = self.missing.view(*self.missing.shape, *[1] * (slab.ndim - 2))
        return slab[self.slots[:, None], self.ring].masked_fill_(missing, 0)

    def store(self, slab: Tensor, rows: Tensor) -> None:
        """Write rows [R, ...] into the rings."""
        slab[self.slots[self.users[self.stay]], self.offsets[self.stay] % self.window] = rows[self.stay]

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        """Cached entries [S, W - 1, ...], then the new ones ([R, ...]) of each user, oldest first."""
        return torch.cat([old, self.pad(new)], dim=1)

    def pad(self, rows: Tensor) -> Tensor:
        """[R, ...] as [S, P, ...], zero where a user has fewer rows."""
        padded = rows.new_zeros(len(self.slots), self.longest, *rows.shape[1:])
        padded[self.users, self.within] = rows
        return padded
