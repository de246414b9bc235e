"""From a release on disk to something that embeds users: the interface that streams/ knows, and its one constructor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from encoder.actions import SequenceBatch
from encoder.inference.full import FULL_USERS_MAX, FullStreamingRuntime, FullWindowRuntime
from encoder.inference.incremental import IncrementalRuntime
from encoder.inference.kernel import Geometry
from encoder.inference.steps import Steps
from encoder.inference.twin import TorchKernel
from encoder.model import StreamingEncoder
from encoder.release import Release, load_release

Kind = Literal["incremental", "full"]
DType = Literal["auto", "fp32", "bf16"]


class EncoderRuntime(Protocol):
    """Embeds users, always called from the same thread. An embedding does not depend on what else is in the batch."""

    version: str
    """Of the release."""
    embedding_dim: int
    sequence_length: int
    """Rows of history that can matter, M; callers pass at most that many newest rows of each user."""

    def embed(self, batch: SequenceBatch) -> npt.NDArray[np.float32]:
        """Embeddings [U, E] of length one; each user occurs once and has at least one row, else `ValueError`."""

    def forget(self, users: Sequence[bytes]) -> None:
        """Drop what is kept of these users."""

    def clear(self) -> None:
        """Drop what is kept of everybody."""


def load_runtime(
    release_dir: Path,
    *,
    kind: Kind = "incremental",
    cache_bytes_max: int,
    threads: int = 1,
    dtype: DType = "auto",
) -> EncoderRuntime:
    """The runtime of a release; sets torch's threads for the process.

    `cache_bytes_max` bounds the memory of what is kept of users, and is set aside at once. Raises `ReleaseError` for
    a release that cannot be trusted and `ValueError` for settings that do not fit it.
    """
    torch.set_num_threads(threads)
    release = load_release(release_dir)
    if not isinstance(release.model, StreamingEncoder):
        if kind == "incremental":
            raise ValueError("a window encoder keeps nothing between actions: set the runtime's kind to full")
        return FullWindowRuntime(release)
    return make_runtime(release, kind=kind, cache_bytes_max=cache_bytes_max, dtype=choose_dtype(dtype))


def make_runtime(
    release: Release, *, kind: Kind, cache_bytes_max: int, dtype: torch.dtype
) -> IncrementalRuntime | FullStreamingRuntime:
    """The runtime of a streaming release that is already in memory, with products and cache in `dtype`."""
    geometry = Geometry.of(release.config, dtype)
    per_user = TorchKernel.bytes_per_slot(geometry)
    slots = cache_bytes_max // per_user
    if kind == "full":
        slots = min(slots, FULL_USERS_MAX)
    if slots < 1:
        raise ValueError(f"cache is too small for one user: {cache_bytes_max} bytes; set at least {per_user}")
    steps = Steps(release, TorchKernel(geometry, slots, slopes(release)), dtype)
    if kind == "full":
        return FullStreamingRuntime(release, steps, slots)
    return IncrementalRuntime(release.version, release.config, steps, slots)


def slopes(release: Release) -> torch.Tensor | None:
    """The non-negative slopes of the event-time bias, [L, H] float32; None when the encoder has none."""
    if not release.config.time_bias:
        return None
    learned: list[torch.Tensor] = [block.slope for block in release.model.layers if block.slope is not None]
    return F.softplus(torch.stack(learned)).detach()


def choose_dtype(dtype: DType) -> torch.dtype:
    """The type by name."""
    return torch.bfloat16 if dtype == "bf16" else torch.float32
