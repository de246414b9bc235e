"""The full runtime: every embedding is computed from the user's kept actions; nothing is cached between calls.

A batch is cut into parts of users with similar lengths. A streaming encoder runs as a forward pass from empty slots:
the rows of all users are packed one behind another, and each layer computes only what the newest position depends on.
A window encoder (PinnerFormer as published) runs padded, and only the newest position goes through its last layer.

Shapes: U users of the batch, B users of a part, L actions of the longest, D model, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32, I64
from encoder.attention import attend
from encoder.features import padded_rows, sequence_positions
from encoder.inference.forward import ForwardPass
from encoder.inference.incremental import TOKENS_MAX, bounded, check
from encoder.inference.plan import offsets_of
from encoder.inference.transfer import to_device, to_host
from encoder.model import WindowEncoder, newest
from encoder.release import Release

FULL_USERS_MAX = 128
"""Users of one part of a full pass; a streaming encoder needs a slot for each while the part runs."""


class _FullRuntime:
    """The part that both full runtimes share: it cuts a batch into parts."""

    def __init__(self, release: Release, reach: int, users_max: int, dtype: str) -> None:
        self.version = release.version
        self.dtype = dtype
        self.extensions = 0
        self.prefills = 0
        self.embedding_dim = release.config.embedding_dim
        self.sequence_length = release.config.sequence_length
        self.actions_needed = release.config.actions_needed
        self._reach = reach
        self._users_max = users_max

    def embed(self, batch: SequenceBatch) -> F32:
        """Return embeddings [U, E] of length one. Each user has at least one row; raises `ValueError`."""
        check(batch)
        embeddings = np.empty((len(batch), self.embedding_dim), np.float32)
        lengths = np.minimum(np.diff(batch.starts), self._reach)  # [U]
        for part in bounded(lengths, TOKENS_MAX, self._users_max):
            embeddings[part] = self._pass(batch, part, lengths[part])
        self.prefills += len(batch)
        return embeddings

    def forget(self, users: Sequence[bytes]) -> None:
        """Do nothing, because nothing is cached."""

    def clear(self) -> None:
        """Do nothing, because nothing is cached."""

    def _pass(self, batch: SequenceBatch, users: I64, lengths: I64) -> F32:
        """Return embeddings [B, E] of `users` [B] from the newest `lengths` [B] rows of each."""
        raise NotImplementedError


class FullStreamingRuntime(_FullRuntime):
    """Full passes of a `StreamingEncoder`; the kernel behind `forward` has `slots` slots."""

    def __init__(self, release: Release, forward: ForwardPass, slots: int) -> None:
        super().__init__(release, release.config.receptive_field, slots, forward.dtype)
        self._forward = forward

    def _pass(self, batch: SequenceBatch, users: I64, lengths: I64) -> F32:
        slots = np.arange(len(users))
        return self._forward.run(batch, users, slots, lengths, batch.counts[users] - lengths)


class FullWindowRuntime(_FullRuntime):
    """Full passes of a `WindowEncoder`, in float32."""

    def __init__(self, release: Release) -> None:
        super().__init__(release, release.config.sequence_length, FULL_USERS_MAX, "float32")
        assert isinstance(release.model, WindowEncoder)
        self._model = release.model
        self._tokenizer = release.tokenizer

    @torch.inference_mode()
    def _pass(self, batch: SequenceBatch, users: I64, lengths: I64) -> F32:
        starts = offsets_of(lengths)  # [B + 1]
        rows = np.repeat(batch.starts[users + 1] - starts[1:], lengths) + np.arange(starts[-1])  # [sum of lengths]
        tokens = self._tokenizer.tokenize(batch.actions[rows], starts, sequence_positions(starts, batch.counts[users]))
        device = self._model.device
        (ends,) = to_device(device, lengths)
        x = self._model.inputs(tokens.features(padded_rows(starts)).to(device), ends)  # [B, L, D]
        return to_host(self._newest(x, ends))

    def _newest(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return embeddings [B, E] of tokens [B, L, D]; the last layer mixes for the newest position only."""
        *layers, last = self._model.layers
        visible = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # [B, L]
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()  # [L, L]
        for block in layers:
            q, k, v = block.project(x, None)  # [B, L, H or G, K]
            x = block.finish(x, attend(q, k, v, causal))  # [B, L, D]
        q, k, v = last.project(x, None)
        mixed = attend(newest(q, lengths)[:, None], k, v, visible[:, None, None])  # [B, 1, H, K]
        embedding: Tensor = self._model.head(last.finish(newest(x, lengths)[:, None], mixed))  # [B, 1, E]
        return embedding[:, 0]
