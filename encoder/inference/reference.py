"""The kernel in plain torch, kept simple so that the fast one can be tested against it.

Each layer lays its ragged rows out as [S, P], puts the W - 1 cached positions before each user's rows, and attends
under a mask. For one user with window W = 4 whose rows in this layer have offsets 6 and 7, and P = 3:

    keys and values     3   4   5  |  6   7   -        [W - 1 + P]: cached positions, new rows, padding
    place in the ring   3   0   1  |  2   3   -        offset % W
    row 6 sees          x   x   x     x
    row 7 sees              x   x     x   x

This kernel also serves on a CUDA device. Everything whose shape depends on a count is computed on the host, so no
operation on the device makes the host wait.

Shapes: S users, T tokens of the plan, R rows of a layer, Q rows with output, P the longest user's rows, H heads,
G key/value heads, J = H / G, K head size, W window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoder.arrays import I64
from encoder.attention import apply_rope, log_minutes, rope_at
from encoder.hardware import CPU
from encoder.inference.kernel import Geometry
from encoder.inference.plan import Plan, suffixes
from encoder.inference.transfer import to_device
from encoder.model import TimeEncoding


class TorchKernel:
    """The reference kernel. `slopes` [L, H] are the non-negative slopes of the event-time bias, or None without one."""

    def __init__(self, geometry: Geometry, slots: int, slopes: Tensor | None, device: torch.device = CPU) -> None:
        g = geometry
        self.geometry = g
        self.slopes = slopes
        self.device = device
        self.keys = [torch.zeros(slots, w, g.kv_heads, g.head_dim, dtype=g.cells, device=device) for w in g.windows]
        self.values = [torch.zeros_like(keys) for keys in self.keys]  # [slots, W, G, K] per layer
        self.times_ms = torch.zeros(slots, max(g.windows), dtype=torch.int64, device=device)

    @staticmethod
    def bytes_per_slot(geometry: Geometry) -> int:
        """Return the memory of one user, in bytes."""
        vectors = 2 * geometry.kv_heads * geometry.head_dim * sum(geometry.windows)
        return vectors * geometry.cells.itemsize + 8 * max(geometry.windows)

    def begin(self, plan: Plan, times_ms: I64) -> None:
        """Begin a pass; see `Kernel.begin`."""
        positions, times = to_device(self.device, plan.positions, times_ms)
        self._begin(partial(_Block.of, plan, self.device), positions, times)

    def begin_single(self, slots: Tensor, offsets: Tensor, positions: Tensor, times_ms: Tensor) -> None:
        """Begin a pass of one new token per user, from tensors [S] on the device; shapes depend on S only."""
        self._begin(partial(_Block.single, slots, offsets), positions, times_ms)

    def _begin(self, block_of: Callable[[int, int], _Block], positions: Tensor, times_ms: Tensor) -> None:
        self._block_of = block_of
        self._rope = rope_at(positions, self.geometry.head_dim)  # cos and sin [T, 1, K / 2]
        block = block_of(0, self.times_ms.shape[1])
        self._token_ms = times_ms  # [T]
        self._old_ms = block.cached(self.times_ms)  # [S, widest window - 1]
        block.store(self.times_ms, times_ms)

    def attend(self, layer: int, qkv: Tensor, out: Tensor) -> None:
        """Attend in one layer; see `Kernel.attend`."""
        g = self.geometry
        block = self._block_of(layer, g.windows[layer])
        q, k, v = torch.split(qkv.view(len(qkv), -1, g.head_dim), [g.heads, g.kv_heads, g.kv_heads], dim=-2)
        cos, sin = self._rope
        rope = cos[block.tokens], sin[block.tokens]  # [R, 1, K / 2]
        k = apply_rope(k.float(), rope).to(g.cells)  # [R, G, K]
        keys = block.join(block.cached(self.keys[layer]), k).float()  # [S, W - 1 + P, G, K]
        values = block.join(block.cached(self.values[layer]), v.to(g.cells)).float()  # [S, W - 1 + P, G, K]
        out.copy_(self._mix(layer, block, apply_rope(q.float(), rope), keys, values)[block.kept])  # [Q, H K]
        block.store(self.keys[layer], k)
        block.store(self.values[layer], v.to(g.cells))

    def add_norm(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm, out: Tensor) -> None:
        """Add and normalise; see `Kernel.add_norm`."""
        if y is not None:
            x += y
        out.copy_(norm(x))

    def gelu(self, x: Tensor) -> None:
        """Apply GELU in place; see `Kernel.gelu`."""
        x.copy_(F.gelu(x.float(), approximate="tanh"))

    def encode_times(self, encoding: TimeEncoding, time_ms: Tensor, out: Tensor) -> None:
        """Encode times; see `Kernel.encode_times`."""
        out.copy_(encoding(time_ms))

    def to_length_one(self, x: Tensor, out: Tensor) -> None:
        """Normalise to length one; see `Kernel.to_length_one`."""
        out.copy_(F.normalize(x.float(), dim=-1))

    def _mix(self, layer: int, block: _Block, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return softmax attention [R, H K] of rows q [R, H, K] over keys and values [S, W - 1 + P, G, K]."""
        g = self.geometry
        padded = block.pad(q)  # [S, P, H, K]
        grouped = padded.view(*padded.shape[:2], g.kv_heads, -1, g.head_dim)  # [S, P, G, J, K]
        logits = torch.einsum("sigjd,skgd->sgjik", grouped, keys) / g.head_dim**0.5  # [S, G, J, P, W - 1 + P]
        if self.slopes is not None:
            logits -= self.slopes[layer].view(g.kv_heads, -1, 1, 1) * self._time_gaps(block)[:, None, None]
        logits.masked_fill_(~block.visible[:, None, None], float("-inf"))
        weights = logits.softmax(-1).nan_to_num(0.0)  # a row of padding may see nothing; its softmax is NaN
        mixed = torch.einsum("sgjik,skgd->sigjd", weights, values)  # [S, P, G, J, K]
        return mixed.flatten(2)[block.users, block.within]  # [R, H K]

    def _time_gaps(self, block: _Block) -> Tensor:
        """Return log(1 + minutes) from each key to each query, [S, P, W - 1 + P]."""
        new_ms = block.pad(self._token_ms[block.tokens])  # [S, P]
        return log_minutes(new_ms, torch.cat([self._older_ms(block), new_ms], dim=1))

    def _older_ms(self, block: _Block) -> Tensor:
        """Return the event times of the W - 1 positions before each user's rows, [S, W - 1].

        Some of these positions can be tokens of this plan, because a deeper layer computes only a user's newest tokens.
        Their times are in `_token_ms`; the others were in the ring before the pass, of which `_old_ms` is a copy:

            column of _old_ms     0 ............ width - 1 |            (just before the user's first token)
            token of the plan                              | starts ... firsts ...
            W - 1 positions                    |<---- `before` --->|
        """
        starts = block.starts[:, None]  # [S, 1]
        before = block.firsts[:, None] + torch.arange(1 - block.window, 0, device=starts.device)  # [S, W - 1]
        width = self._old_ms.shape[1]
        old = self._old_ms.gather(1, (before - starts + width).clamp(0, max(width - 1, 0))) if width else self._old_ms
        new = self._token_ms[before.clamp(min=0)]  # [S, W - 1]
        return torch.where(before >= starts, new, old)


@dataclass(slots=True)
class _Block:
    """Indices of one layer's rows: their tokens in the plan, their places in the rings, and the keys they may see."""

    window: int
    longest: int
    """Number P of rows of the user with the most."""
    slots: Tensor
    """Slot [S] of each user."""
    starts: Tensor
    """Token [S] of the plan that is the user's first."""
    firsts: Tensor
    """Token [S] that is the user's first in this layer."""
    cached_until: Tensor
    """Offset [S] of the plan's first token. A slot holds only what precedes it: tokens that the plan leaves out of this
    layer are never written."""
    first_offsets: Tensor
    """Offset [S] of the user's first row."""
    users: Tensor
    """User [R] of each row."""
    within: Tensor
    """Number [R] of rows of the same user before it."""
    tokens: Tensor
    """Token [R] of the plan that the row is."""
    offsets: Tensor
    """Offset [R] of that token."""
    kept: Tensor
    """Rows [Q] with output."""
    stay: Tensor
    """Rows that enter the ring: the newest W of each user, so that no place is written twice."""
    ring: Tensor = field(init=False)
    """Places [S, W - 1] of the positions before the user's rows."""
    missing: Tensor = field(init=False)
    """True [S, W - 1] for the positions before the user's rows that its slot does not hold."""
    visible: Tensor = field(init=False)
    """True [S, P, W - 1 + P] where a row sees a key."""

    def __post_init__(self) -> None:
        first = self.first_offsets[:, None]  # [S, 1]
        old = first + torch.arange(1 - self.window, 0, device=first.device)  # [S, W - 1]
        new = first + torch.arange(self.longest, device=first.device)  # [S, P]
        self.ring = old % self.window
        self.missing = (old < 0) | (old >= self.cached_until[:, None])
        keys = torch.cat([old, new], dim=1)  # [S, W - 1 + P] offset of each key
        behind = new[..., None] - keys[:, None]  # [S, P, W - 1 + P] how much older the key is
        self.visible = (behind >= 0) & (behind < self.window) & (keys >= 0)[:, None]

    @classmethod
    def of(cls, plan: Plan, device: torch.device, layer: int, window: int) -> _Block:
        """Return the indices of a layer of a plan, computed on the host and copied in one piece."""
        rows = plan.layers[layer]
        lengths = np.diff(rows.starts)  # [S]
        users = np.repeat(np.arange(len(lengths)), lengths)  # [R]
        within = np.arange(len(users)) - rows.starts[users]  # [R]
        tokens = rows.tokens[users] + within  # [R]
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
        return cls(window, int(lengths.max()), *to_device(device, *columns))

    @classmethod
    def single(cls, slots: Tensor, offsets: Tensor, layer: int, window: int) -> _Block:
        """Return the indices for users with one row each, which are the same in all layers."""
        every = torch.arange(len(slots), device=slots.device)
        none = torch.zeros_like(every)
        return cls(window, 1, slots, every, every, offsets, offsets, every, none, every, offsets, every, every)

    def cached(self, slab: Tensor) -> Tensor:
        """Return the W - 1 positions before each user's rows from a slab [slots, W, ...]: [S, W - 1, ...].

        Positions that the slot does not hold are 0.
        """
        missing = self.missing.view(*self.missing.shape, *[1] * (slab.ndim - 2))
        return slab[self.slots[:, None], self.ring].masked_fill_(missing, 0)

    def store(self, slab: Tensor, rows: Tensor) -> None:
        """Write rows [R, ...] into the rings."""
        slab[self.slots[self.users[self.stay]], self.offsets[self.stay] % self.window] = rows[self.stay]

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        """Return [S, W - 1 + P, ...]: cached entries [S, W - 1, ...], then each user's new rows of [R, ...]."""
        return torch.cat([old, self.pad(new)], dim=1)

    def pad(self, rows: Tensor) -> Tensor:
        """Lay rows [R, ...] out as [S, P, ...], with zeros where a user has fewer rows."""
        padded = rows.new_zeros(len(self.slots), self.longest, *rows.shape[1:])
        padded[self.users, self.within] = rows
        return padded
