"""Initial item vectors from co-occurrence: which items users act on within a few actions of each other.

The matrix of positive pointwise mutual information with smoothed contexts is factorised by a randomised
eigendecomposition. Word2vec's skip-gram factorises the same matrix implicitly (Levy, Goldberg 2014; Levy, Goldberg,
Dagan 2015). It takes seconds and replaces several epochs of training.

Shapes: N actions, I items, V item vector, C distinct pairs of items that occur together.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from encoder.arrays import F64, I64
from encoder.features import UNKNOWN

SPAN = 10
"""Largest distance, in actions, at which two items count as a co-occurrence."""
SMOOTHING = 0.75
STD = 0.1
"""Standard deviation of the returned vectors."""
OVERSAMPLED, ITERATIONS = 16, 4


def cooccurrence_vectors(item: I64, user: I64, *, items: int, dim: int, generator: torch.Generator) -> Tensor:
    """Return vectors [I + 1, V] from item rows [N], ordered by time within each user, and users [N].

    Row 0 and items that do not occur are 0. With fewer items than `dim`, the remaining columns are 0.
    """
    rank = min(dim, items)
    vectors = torch.zeros(items + 1, dim)
    vectors[:, :rank] = _factors(_mutual_information(item, user, items), rank, generator)
    return vectors * (STD / vectors.std().clamp(min=1e-6))


def _mutual_information(item: I64, user: I64, items: int) -> Tensor:
    """Return the sparse matrix [I + 1, I + 1] of positive pointwise mutual information.

        PMI(a, b) = log( count(a, b) / (count(a) * P(b)) )        P(b) = count(b)^0.75 / sum count^0.75

    Pairs of items are counted under one integer key, a * (I + 1) + b, in both orders.
    """
    keys: I64 = np.zeros(0, np.int64)
    counts: F64 = np.zeros(0)
    for apart in range(1, SPAN + 1):  # all pairs of rows (i, i + apart) of one user
        near = (user[apart:] == user[:-apart]) & (item[apart:] != UNKNOWN) & (item[:-apart] != UNKNOWN)
        pair = np.stack([item[:-apart][near], item[apart:][near]])  # [2, pairs]
        both_orders = np.concatenate([pair[0] * (items + 1) + pair[1], pair[1] * (items + 1) + pair[0]])
        new, new_counts = np.unique(both_orders, return_counts=True)
        keys, inverse = np.unique(np.concatenate([keys, new]), return_inverse=True)
        counts = np.bincount(inverse, np.concatenate([counts, new_counts])).astype(np.float64)
    first, second = np.divmod(keys, items + 1)  # [C], [C]
    total = np.bincount(first, counts, minlength=items + 1)  # [I + 1]
    context = np.maximum(total, 1e-9) ** SMOOTHING
    value = np.log(counts / (total[first] * (context / context.sum())[second]))  # [C]
    kept = value > 0  # [C]
    at = torch.from_numpy(np.stack([first[kept], second[kept]]))
    matrix: Tensor = torch.sparse_coo_tensor(
        at, torch.from_numpy(value[kept]).float(), (items + 1, items + 1), check_invariants=True
    )
    return matrix.coalesce()


def _factors(matrix: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return the leading eigenvectors [I + 1, rank] of a symmetric matrix, scaled by sqrt(|eigenvalue|).

    Uses subspace iteration from a random start (Halko, Martinsson, Tropp 2011, algorithm 4.4). The sign of each
    eigenvector is normalised, so equal seeds give equal vectors.
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
