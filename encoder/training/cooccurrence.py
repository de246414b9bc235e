"""Item vectors to begin with: a factorisation of which items users act on within a few actions of each other.

Positive pointwise mutual information with smoothed contexts, factorised by a randomised eigen-decomposition; what
word2vec's skip-gram does implicitly (Levy, Goldberg 2014; Levy, Goldberg, Dagan 2015). Seconds instead of epochs.

Shapes: N actions, I items, V item vector.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from encoder.arrays import F64, I64
from encoder.features import UNKNOWN

SPAN = 10
"""Actions apart at which two items still count as acted on together."""
SMOOTHING = 0.75
STD = 0.1
"""Of the vectors returned."""
OVERSAMPLED, ITERATIONS = 16, 4


def cooccurrence_vectors(item: I64, user: I64, *, items: int, dim: int, generator: torch.Generator) -> Tensor:
    """[I + 1, V] from item rows [N] in each user's order and users [N]; row 0 and items never seen are 0.

    With fewer items than `dim`, the columns behind are 0.
    """
    rank = min(dim, items)
    vectors = torch.zeros(items + 1, dim)
    vectors[:, :rank] = _factors(_mutual_information(item, user, items), rank, generator)
    return vectors * (STD / vectors.std().clamp(min=1e-6))


def _mutual_information(item: I64, user: I64, items: int) -> Tensor:
    """Sparse [I + 1, I + 1]: log of how much more often two items meet than by chance, where it is positive."""
    keys: I64 = np.zeros(0, np.int64)
    counts: F64 = np.zeros(0)
    for apart in range(1, SPAN + 1):
        near = (user[apart:] == user[:-apart]) & (item[apart:] != UNKNOWN) & (item[:-apart] != UNKNOWN)
        pair = np.stack([item[:-apart][near], item[apart:][near]])
        met = np.concatenate([pair[0] * (items + 1) + pair[1], pair[1] * (items + 1) + pair[0]])
        new, new_counts = np.unique(met, return_counts=True)
        keys, inverse = np.unique(np.concatenate([keys, new]), return_inverse=True)
        counts = np.bincount(inverse, np.concatenate([counts, new_counts])).astype(np.float64)
    first, second = np.divmod(keys, items + 1)
    often = np.bincount(first, counts, minlength=items + 1)
    context = np.maximum(often, 1e-9) ** SMOOTHING
    value = np.log(counts / (often[first] * (context / context.sum())[second]))
    kept = value > 0
    at = torch.from_numpy(np.stack([first[kept], second[kept]]))
    matrix: Tensor = torch.sparse_coo_tensor(
        at, torch.from_numpy(value[kept]).float(), (items + 1, items + 1), check_invariants=True
    )
    return matrix.coalesce()


def _factors(matrix: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """[I + 1, rank]: leading eigenvectors of a symmetric matrix times the roots of their eigenvalues' sizes.

    Subspace iteration from a random start (Halko, Martinsson, Tropp 2011, algorithm 4.4). The signs of eigenvectors
    are fixed, so equal seeds give equal vectors.
    """
    width = min(rank + OVERSAMPLED, matrix.shape[0])
    basis = torch.randn(matrix.shape[0], width, generator=generator)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, within = torch.linalg.eigh(basis.T @ (matrix @ basis))
    leading = values.abs().argsort(descending=True)[:rank]
    vectors: Tensor = basis @ within[:, leading]
    signs = torch.where(vectors.sum(dim=0) < 0, -1.0, 1.0)
    scaled: Tensor = vectors * signs * values[leading].abs().sqrt()
    return scaled
