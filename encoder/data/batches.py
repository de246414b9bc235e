"""Batches: histories cut into chunks at a random phase, grouped by length, in random order.

All randomness comes from the generator passed in, which callers seed from (seed, epoch, part), so a training that
resumes needs no generator state.

Shapes: N rows of a log, U users, C chunks, B chunks of one batch, L actions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from encoder.arrays import I64
from encoder.training.recipe import DataConfig

LENGTH_STEP = 16
"""Padded lengths are multiples of this: with few distinct shapes, cached kernels are reused."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """C pieces of histories: chunk c is the rows first[c] to first[c] + length[c] of the log."""

    first: I64
    """[C] first row."""
    length: I64
    """[C] number of rows."""


def epoch_chunks(starts: I64, chunk: int, rng: np.random.Generator) -> Chunks:
    """Cut each user's rows at a random phase and every `chunk` rows from there; every row is in exactly one chunk.

    rows        0 1 2 3 4 5 6 7 8 9         length 10, chunk 4, phase 3
    grid    - - - 0 - - - 1 - - - 2 - -     the grid begins `phase` rows before the user
    chunks  [0]     [1 2 3 4] [5 6 7 8] [9]
    """
    lengths = np.diff(starts)  # [U]
    phase = rng.integers(0, chunk, len(lengths))  # [U]
    pieces = np.where(lengths > 0, (lengths + phase - 1) // chunk + 1, 0)  # [U]
    user = np.repeat(np.arange(len(lengths)), pieces)  # [C]
    number = np.arange(len(user)) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # [C] 0, 1, ... within each user
    begin = np.maximum(number * chunk - phase[user], 0)
    end = np.minimum((number + 1) * chunk - phase[user], lengths[user])
    kept = end > begin
    return Chunks((starts[user] + begin)[kept], (end - begin)[kept])


def epoch_batches(
    starts: I64, config: DataConfig, rng: np.random.Generator, *, rank: int = 0, ranks: int = 1
) -> Iterator[I64]:
    """Yield the row matrices [B, L] of one epoch, padded with -1, each of at most `batch_tokens` padded tokens.

    Each of several processes takes every `ranks`-th batch; the last batches of an epoch, if there are fewer than
    `ranks`, are skipped.
    """
    chunks = epoch_chunks(starts, config.chunk, rng)
    padded = -(-chunks.length // LENGTH_STEP) * LENGTH_STEP  # [C] lengths, rounded up
    order = np.lexsort((rng.random(len(padded)), padded))  # [C] by padded length, at random within one length
    groups = list(_groups(padded[order], config.batch_tokens))
    for number in rng.permutation(len(groups))[rank : len(groups) // ranks * ranks : ranks]:
        members = order[groups[number]]  # [B]
        at = np.arange(padded[members].max())  # [L]
        yield np.where(at < chunks.length[members, None], chunks.first[members, None] + at, -1)


def _groups(padded: I64, batch_tokens: int) -> Iterator[slice]:
    """Yield slices of ascending lengths, each within `batch_tokens` padded tokens or of a single chunk."""
    start = 0
    while start < len(padded):
        ahead = padded[start : start + batch_tokens]
        # Lengths ascend, so a group that ends at ahead[i] is padded to ahead[i] and has ahead[i] * (i + 1) tokens.
        fits = ahead * np.arange(1, len(ahead) + 1) <= batch_tokens
        stop = start + max(1, int(fits.argmin()) if not fits.all() else len(fits))
        yield slice(start, stop)
        start = stop
