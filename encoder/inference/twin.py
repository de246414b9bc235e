"""The kernel in plain torch: nothing clever, so that the fast one has something to be measured against.

Each layer lays its ragged rows out as [S, longest], puts the W - 1 cached positions before each user's rows, and
attends under a mask. Shapes as in `kernel`; P is the longest number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoder.attention import log_minutes, rotate, rotation_at
from encoder.inference.cone import Int64s, Plan
from encoder.inference.kernel import Geometry


class TorchKernel:
    """The reference kernel. `slopes` [L, H] are the non-negative slopes of the event-time bias, None without."""

    def __init__(self, geometry: Geometry, slots: int, slopes: Tensor | None) -> None:
        g = geometry
        self.geometry = g
        self.slopes = slopes
        self.keys = [torch.zeros(slots, w, g.kv_heads, g.head_dim, dtype=g.cells) for w in g.windows]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.times_ms = torch.zeros(slots, max(g.windows), dtype=torch.int64)

    @staticmethod
    def bytes_per_slot(geometry: Geometry) -> int:
        """Memory of one user, in bytes."""
        vectors = 2 * geometry.kv_heads * geometry.head_dim * sum(geometry.windows)
        return vectors * geometry.cells.itemsize + 8 * max(geometry.windows)

    def begin(self, plan: Plan, times_ms: Int64s) -> None:
        self._plan = plan
        self._rotation = rotation_at(torch.from_numpy(plan.positions), self.geometry.head_dim)
        block = _Block(plan, 0, self.times_ms.shape[1])
        times = torch.from_numpy(times_ms)
        self._token_ms = times
        self._old_ms = block.cached(self.times_ms)
        block.store(self.times_ms, times)

    def attend(self, layer: int, qkv: Tensor, out: Tensor) -> None:
        g = self.geometry
        block = _Block(self._plan, layer, g.windows[layer])
        q, k, v = torch.split(qkv.view(len(qkv), -1, g.head_dim), [g.heads, g.kv_heads, g.kv_heads], dim=-2)
        cos, sin = self._rotation
        rotation = cos[block.tokens], sin[block.tokens]
        k = rotate(k.float(), rotation).to(g.cells)
        keys = block.join(block.cached(self.keys[layer]), k).float()
        values = block.join(block.cached(self.values[layer]), v.to(g.cells)).float()
        out.copy_(self._mix(layer, block, rotate(q.float(), rotation), keys, values)[block.with_output])
        block.store(self.keys[layer], k)
        block.store(self.values[layer], v.to(g.cells))

    def add_norm(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm, out: Tensor) -> None:
        if y is not None:
            x += y
        out.copy_(norm(x))

    def gelu(self, x: Tensor) -> None:
        x.copy_(F.gelu(x.float(), approximate="tanh"))

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
        starts = torch.from_numpy(self._plan.starts)[:-1, None]
        before = torch.from_numpy(self._plan.layers[block.layer].tokens)[:, None] + torch.arange(1 - block.window, 0)
        width = self._old_ms.shape[1]
        old = self._old_ms.gather(1, (before - starts + width).clamp(0, max(width - 1, 0))) if width else self._old_ms
        new = self._token_ms[before.clamp(min=0)]
        return torch.where(before >= starts, new, old)


class _Block:
    """Indices of one layer's rows: where each lies in the plan, in its user's ring, and which keys it may see."""

    def __init__(self, plan: Plan, layer: int, window: int) -> None:
        rows = plan.layers[layer]
        starts = torch.from_numpy(rows.starts)
        self.layer = layer
        self.window = window
        self.slots = torch.from_numpy(plan.slots)
        self.lengths = starts.diff()
        self.users = torch.repeat_interleave(self.lengths)
        self.within = torch.arange(len(self.users)) - starts[self.users]
        self.tokens = torch.from_numpy(rows.tokens)[self.users] + self.within
        self.with_output = self.within >= torch.from_numpy(rows.silent)[self.users]
        self.offsets = torch.from_numpy(plan.offsets)[self.tokens]
        first = self.offsets[starts[:-1]][:, None]
        old = first + torch.arange(1 - window, 0)
        steps = first + torch.arange(int(self.lengths.max()))
        self.ring = old % window
        keys = torch.cat([old, steps], dim=1)
        behind = steps[..., None] - keys[:, None]
        self.visible = (behind >= 0) & (behind < window) & (keys >= 0)[:, None]
        # A slot holds what lies before the plan's first token; what a cone left out after it was never written.
        cached_until = torch.from_numpy(plan.offsets[plan.starts[:-1]])[:, None]
        self.held = (old >= 0) & (old < cached_until)

    def cached(self, slab: Tensor) -> Tensor:
        """What a slab [slots, W, ...] holds of the W - 1 positions before each user's rows, 0 elsewhere."""
        held = self.held.view(*self.held.shape, *[1] * (slab.ndim - 2))
        return torch.where(held, slab[self.slots[:, None], self.ring], torch.zeros((), dtype=slab.dtype))

    def store(self, slab: Tensor, rows: Tensor) -> None:
        """Write rows [R, ...] into the rings; of more than a window's worth, the newest stay."""
        stay = self.within >= self.lengths[self.users] - self.window
        slab[self.slots[self.users[stay]], self.offsets[stay] % self.window] = rows[stay]

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        """Cached entries [S, W - 1, ...], then the new ones ([R, ...]) of each user, oldest first."""
        return torch.cat([old, self.pad(new)], dim=1)

    def pad(self, rows: Tensor) -> Tensor:
        """[R, ...] as [S, P, ...], zero where a user has fewer rows."""
        padded = rows.new_zeros(len(self.lengths), int(self.lengths.max()), *rows.shape[1:])
        padded[self.users, self.within] = rows
        return padded
