"""The interface through which streams/ embeds users. It needs no torch, unlike what implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32


class EncoderRuntime(Protocol):
    """Embeds users; always called from the same thread. The rest of a batch never changes a user's embedding."""

    version: str
    """Version of the loaded release."""
    embedding_dim: int
    sequence_length: int
    """Number of newest actions that an embedding can depend on, M; callers pass at most M rows per user."""
    actions_needed: int
    """Number of newest actions that callers have to keep per user; with fewer, embeddings depend on what is cached."""
    dtype: str
    """Type of the matrix products: `float32` or `bfloat16`."""
    extensions: int
    """Number of embeddings so far that were computed from the cache and the new actions alone."""
    prefills: int
    """Number of embeddings so far for which a sequence was computed from its start."""

    def embed(self, batch: SequenceBatch) -> F32:
        """Return embeddings [U, E] of length one; each user occurs once and has at least one row, else `ValueError`."""

    def forget(self, users: Sequence[bytes]) -> None:
        """Drop what is cached of these users."""

    def clear(self) -> None:
        """Drop what is cached of all users."""
