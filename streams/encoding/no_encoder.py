"""The runtime of a worker without an encoder, which publishes features only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32


class NoEncoder:
    """Embeds nothing: an embedding has no number; implements `encoder.inference.EncoderRuntime`."""

    version = ""
    embedding_dim = 0
    sequence_length = actions_needed = 0
    dtype = "none"
    extensions = prefills = 0

    def embed(self, batch: SequenceBatch) -> F32:
        """Return [U, 0]."""
        return np.zeros((len(batch), 0), np.float32)

    def forget(self, users: Sequence[bytes]) -> None:
        """Do nothing."""

    def clear(self) -> None:
        """Do nothing."""
