"""The full runtime: every embedding from the user's kept actions, nothing remembered between calls.

Batches are cut into parts of similar length. A streaming encoder runs as a step from empty slots: rows are packed one
behind another and each layer computes only what the newest position depends on. A window encoder (PinnerFormer as
published) runs padded; only the newest position goes through its last layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32
from encoder.attention import attend
from encoder.features import padded_rows, sequence_positions
from encoder.inference.forward import Steps
from encoder.inference.incremental import TOKENS_MAX, bounded, check
from encoder.inference.plan import Int64s, offsets_of
from encoder.inference.transfer import fetched, sent
from encoder.model import WindowEncoder, newest
from encoder.release import Release

FULL_USERS_MAX = 128
"""Users of one part of a full pass; a streaming encoder needs a slot for each while the part runs."""


class _FullRuntime:
    """What both full runtimes share: cutting a batch into parts."""

    def __init__(self, release: Release, reach: int, users_max: int, dtype: str) -> None:
        self.version = release.version
        self.dtype = dtype
        self.extensions = 0
        self.prefills = 0
        self.embedding_dim = release.config.embedding_dim
        self.sequence_length = release.config.sequence_length
        self._reach = reach
        self._users_max = users_max

    def embed(self, batch: SequenceBatch) -> F32:
        """Embeddings [U, E] of length one. Each user has at least one row; raises `ValueError`."""
        check(batch)
        embeddings = np.empty((len(batch), self.embedding_dim), np.float32)
        lengths = np.minimum(np.diff(batch.starts), self._reach)
        for part in bounded(lengths, TOKENS_MAX, self._users_max):
            embeddings[part] = self._pass(batch, part, lengths[part])
        self.prefills += len(batch)
        return embeddings

    def forget(self, users: Sequence[bytes]) -> None:
        """Nothing is kept."""

    def clear(self) -> None:
        """Nothing is kept."""

    def _pass(self, batch: SequenceBatch, users: Int64s, lengths: Int64s) -> F32:
        raise NotImplementedError


class FullStreamingRuntime(_FullRuntime):
    """Full passes of a `StreamingEncoder`; the kernel of `steps` has `slots` slots."""

    def __init__(self, release: Release, steps: Steps, slots: int) -> None:
        super().__init__(release, release.config.receptive_field, slots, steps.dtype)
        self._steps = steps

    def _pass(self, batch: SequenceBatch, users: Int64s, lengths: Int64s) -> F32:
        slots = np.arange(len(users))
        return self._steps.run(batch, users, slots, lengths, batch.counts[users] - lengths)


class FullWindowRuntime(_FullRuntime):
    """Full passes of a `WindowEncoder`, float32."""

    def __init__(self, release: Release) -> None:
        super().__init__(release, release.config.sequence_length, FULL_USERS_MAX, "float32")
        assert isinstance(release.model, WindowEncoder)
        self._model = release.model
        self._tokenizer = release.tokenizer

    @torch.inference_mode()
    def _pass(self, batch: SequenceBatch, users: Int64s, lengths: Int64s) -> F32:
        starts = offsets_of(lengths)
        rows = np.repeat(batch.starts[users + 1] - starts[1:], lengths) + np.arange(starts[-1])
        tokens = self._tokenizer.tokenize(batch.actions[rows], starts, sequence_positions(starts, batch.counts[users]))
        device = self._model.device
        (ends,) = sent(device, lengths)
        x = self._model.inputs(tokens.features(padded_rows(starts)).to(device), ends)
        return fetched(self._newest(x, ends))

    def _newest(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Embeddings [B, E] of tokens [B, L, D]: whole layers but the last, which mixes for one position only."""
        *layers, last = self._model.layers
        visible = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        for block in layers:
            q, k, v = block.project(x, None)
            x = block.finish(x, attend(q, k, v, causal))
        q, k, v = last.project(x, None)
        mixed = attend(newest(q, lengths)[:, None], k, v, visible[:, None, None])
        embedding: Tensor = self._model.head(last.finish(newest(x, lengths)[:, None], mixed))
        return embedding[:, 0]
