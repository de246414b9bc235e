"""Ranks and ranking metrics.

A rank is 0 for the best item. Ties count against the target, so an encoder that gives every item the same score has no
hits.

Shapes: Q queries, C queries of one chunk, E embedding, I items, k recommendations, G groups.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from encoder.arrays import F64, I64

CHUNK = 512
"""Number of queries whose scores exist at one time."""


def target_ranks(
    queries: Tensor,
    items: Tensor,
    targets: I64,
    masked: tuple[I64, I64] | None = None,
    candidates: I64 | None = None,
) -> I64:
    """Return the rank [Q] of each query's target among the items that compete with it.

        rank_q = |{ i competes with target_q : <query_q, item_i> >= <query_q, item_target_q> }|

    All items compete except the `masked` ones, given as pairs (query, item row) sorted by query; with `candidates`,
    only those rows compete. A target always competes, even if it is masked or no candidate. `queries` are [Q, E],
    `items` [I, E], `targets` [Q] item rows.

    Scores 2, 3 and 1: item 0 is second; with item 1 masked it is first.

    >>> query, items = torch.ones(1, 1), torch.tensor([[2.0], [3.0], [1.0]])
    >>> target_ranks(query, items, np.array([0])).tolist()
    [1]
    >>> target_ranks(query, items, np.array([0]), masked=(np.array([0]), np.array([1]))).tolist()
    [0]
    """
    absent = None
    if candidates is not None:
        absent = torch.ones(len(items), dtype=torch.bool)  # [I]
        absent[torch.from_numpy(candidates)] = False
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ items.T  # [C, I]
        target = torch.from_numpy(targets[start : start + CHUNK]).unsqueeze(-1)  # [C, 1]
        own = scores.gather(1, target)  # [C, 1]
        if masked is not None:
            scores[_masked_in_chunk(masked, start, start + len(scores))] = -torch.inf
        if absent is not None:
            scores.masked_fill_(absent, -torch.inf)
        scores.scatter_(1, target, own)  # a target competes even if it was masked
        ranks[start : start + CHUNK] = ((scores >= own).sum(dim=1) - 1).numpy()  # less the target itself
    return ranks


def top_items(queries: Tensor, items: Tensor, k: int, masked: tuple[I64, I64] | None = None) -> I64:
    """Return the rows [Q, k] of the best items of each query, best first, without the `masked` ones.

    >>> top_items(torch.ones(1, 1), torch.tensor([[2.0], [3.0], [1.0]]), 2).tolist()
    [[1, 0]]
    """
    best = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ items.T  # [C, I]
        if masked is not None:
            scores[_masked_in_chunk(masked, start, start + len(scores))] = -torch.inf
        best[start : start + CHUNK] = scores.topk(k, dim=1).indices.numpy()
    return best


def _masked_in_chunk(masked: tuple[I64, I64], start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return the masked pairs of queries `start` to `stop` as an index into their scores [C, I]."""
    first, last = np.searchsorted(masked[0], [start, stop])
    return torch.from_numpy(masked[0][first:last] - start), torch.from_numpy(masked[1][first:last])


def hits_at(ranks: I64, k: int) -> F64:
    """Return 1 for each target [Q] among the best k, else 0.

        hit_q = 1 if rank_q < k else 0

    With one target per query, the mean is both the hit rate and the recall at k. Below: the best item, the tenth, the
    eleventh and one far away.

    >>> hits_at(np.array([0, 9, 10, 500]), 10).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    return (ranks < k).astype(np.float64)


def ndcg_at(ranks: I64, k: int) -> F64:
    """Return the discounted gain [Q] of each single target.

        ndcg_q = 1 / log2(rank_q + 2) if rank_q < k else 0

    With one target per query the ideal gain is 1, so no normalisation is left. Below: 1 / log2(2), 1 / log2(4),
    1 / log2(8), and a target that is not among the best ten.

    >>> ndcg_at(np.array([0, 2, 6, 10]), 10).tolist()
    [1.0, 0.5, 0.3333333333333333, 0.0]
    """
    return np.where(ranks < k, 1.0 / np.log2(ranks + 2.0), 0.0)


def p90_coverage(top: I64, *, items: int) -> float:
    """Return the smallest share of the catalogue that makes up 90 % of all recommendations [Q, k].

        coverage = min{ n : the n most recommended items have at least 0.9 * Q * k recommendations } / items

    P90 coverage is a metric of PinnerFormer (arXiv 2205.04507). Below: ten recommendations over a catalogue of 20
    items; item 7 has eight of them, items 3 and 5 have one each. Two items, 7 and 3, make up 90 %: 2 / 20.

    >>> p90_coverage(np.array([[7, 3], [7, 5], [7, 7], [7, 7], [7, 7]]), items=20)
    0.1
    """
    counts = np.sort(np.unique(top, return_counts=True)[1])[::-1]  # recommendations per item, largest first
    reached = np.searchsorted(np.cumsum(counts), 0.9 * top.size - 1e-9)  # 1e-9: a sum of exactly 90 % is enough
    return float(reached + 1) / items


def interest_entropy(top: I64, interest: I64) -> F64:
    """Return the entropy [Q], in nats, of the interests of each query's recommendations [Q, k].

        entropy_q = - sum_c p_qc * ln p_qc        p_qc = share of interest c in the top k of query q

    `interest` [I] maps item rows to interests. Below: interests 5, 5, 6, 7 give
    -(1/2 ln 1/2 + 1/4 ln 1/4 + 1/4 ln 1/4) = 1.5 ln 2 = 1.04; four times interest 5 gives 0.

    >>> interest_entropy(np.array([[0, 1, 2, 3], [0, 1, 0, 1]]), np.array([5, 5, 6, 7])).round(2).tolist()
    [1.04, 0.0]
    """
    interests = int(interest.max(initial=0)) + 1
    query = np.repeat(np.arange(len(top)), top.shape[1])  # [Q * k]
    key = query * interests + np.sort(interest[top], axis=1).ravel()  # (query, interest) as one integer
    groups, counts = np.unique(key, return_counts=True)
    share = counts / top.shape[1]
    entropy = np.zeros(len(top))
    np.add.at(entropy, groups // interests, -share * np.log(share))
    return entropy


def bootstrap_interval(
    values: F64, groups: I64, *, seed: int, samples: int = 1_000, level: float = 0.95
) -> tuple[float, float]:
    """Return the bootstrap interval of the mean of values [Q], resampling whole groups [Q].

    Each sample draws G groups with replacement; its mean is (sum of the drawn groups' values) / (number of their
    values). Groups are users: the values of one user are correlated, so they must be drawn together.

    >>> bootstrap_interval(np.ones(4), np.array([0, 0, 1, 2]), seed=1)
    (1.0, 1.0)
    """
    _, inverse = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(inverse, values), np.bincount(inverse)  # [G], [G]
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    for number in range(samples):
        draws = np.bincount(rng.integers(0, len(sizes), len(sizes)), minlength=len(sizes))  # [G] times drawn
        means[number] = (draws @ sums) / (draws @ sizes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
