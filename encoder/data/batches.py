"""From a log to batches: histories cut at a random phase, sorted roughly by length, in an order that a seed decides.

Everything random is derived from (seed, epoch, step), so a training that resumes needs no state of a generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from encoder.arrays import I64
from encoder.training.recipe import DataConfig

LENGTH_STEP = 16
"""Padded lengths are multiples of this: few shapes, so prepared kernels are found again."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """C pieces of histories: rows first[c] to first[c] + length[c] of the log."""

    first: I64
    length: I64


def epoch_chunks(starts: I64, chunk: int, rng: np.random.Generator) -> Chunks:
    """Cut each user's rows at a random phase and every `chunk` rows from there; every row is in one chunk."""
    lengths = np.diff(starts)
    phase = rng.integers(0, chunk, len(lengths))
    pieces = np.where(lengths > 0, (lengths + phase - 1) // chunk + 1, 0)
    user = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(user)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = np.maximum(number * chunk - phase[user], 0)
    end = np.minimum((number + 1) * chunk - phase[user], lengths[user])
    kept = end > begin
    return Chunks((starts[user] + begin)[kept], (end - begin)[kept])


def epoch_batches(
    starts: I64, config: DataConfig, rng: np.random.Generator, *, rank: int = 0, ranks: int = 1
) -> Iterator[I64]:
    """Row matrices [B, L] of one epoch, -1 behind the end, each of at most `batch_tokens` padded tokens.

    Of several processes each takes every `ranks`-th batch; what is left over at the end of an epoch is not used.
    """
    chunks = epoch_chunks(starts, config.chunk, rng)
    padded = -(-chunks.length // LENGTH_STEP) * LENGTH_STEP
    order = np.lexsort((rng.random(len(padded)), padded))
    groups = list(_groups(padded[order], config.batch_tokens))
    for number in rng.permutation(len(groups))[rank : len(groups) // ranks * ranks : ranks]:
        members = order[groups[number]]
        at = np.arange(padded[members].max())
        yield np.where(at < chunks.length[members, None], chunks.first[members, None] + at, -1)


def _groups(padded: I64, batch_tokens: int) -> Iterator[slice]:
    """Slices of ascending lengths whose padded size stays within `batch_tokens`, at least one chunk each."""
    start = 0
    while start < len(padded):
        ahead = padded[start : start + batch_tokens]
        fits = ahead * np.arange(1, len(ahead) + 1) <= batch_tokens
        stop = start + max(1, int(fits.argmin()) if not fits.all() else len(fits))
        yield slice(start, stop)
        start = stop
