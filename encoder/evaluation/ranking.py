"""Ranking metrics and the ranks they are made of. Every metric is a fraction one can check by hand.

A rank is 0 for the best item; ties count against the target, so a collapsed encoder scores nothing.
Shapes: Q queries, E embedding, I items.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from encoder.arrays import F64, I64

CHUNK = 512
"""Queries whose scores exist at one time."""


def target_ranks(
    queries: Tensor,
    items: Tensor,
    targets: I64,
    hidden: tuple[I64, I64] | None = None,
    candidates: I64 | None = None,
) -> I64:
    """[Q] rank of each query's target among all items, or the candidates, but those hidden from it.

    `queries` [Q, E], `items` [I, E], `targets` [Q] rows of items; `hidden` gives pairs (query, item row), sorted by
    query, that do not compete; a target is never hidden from itself. `candidates` are the only rows that compete.
    """
    absent = None
    if candidates is not None:
        absent = torch.ones(len(items), dtype=torch.bool)
        absent[torch.from_numpy(candidates)] = False
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ items.T
        target = torch.from_numpy(targets[start : start + CHUNK]).unsqueeze(-1)
        own = scores.gather(1, target)
        if hidden is not None:
            scores[_hidden_part(hidden, start, start + len(scores))] = -torch.inf
        if absent is not None:
            scores.masked_fill_(absent, -torch.inf)
        scores.scatter_(1, target, own)
        ranks[start : start + CHUNK] = ((scores >= own).sum(dim=1) - 1).numpy()
    return ranks


def top_items(queries: Tensor, items: Tensor, k: int, hidden: tuple[I64, I64] | None = None) -> I64:
    """[Q, k] rows of the best items of each query, best first, without those hidden from it."""
    best = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ items.T
        if hidden is not None:
            scores[_hidden_part(hidden, start, start + len(scores))] = -torch.inf
        best[start : start + CHUNK] = scores.topk(k, dim=1).indices.numpy()
    return best


def _hidden_part(hidden: tuple[I64, I64], start: int, stop: int) -> tuple[Tensor, Tensor]:
    first, last = np.searchsorted(hidden[0], [start, stop])
    return torch.from_numpy(hidden[0][first:last] - start), torch.from_numpy(hidden[1][first:last])


def hits_at(ranks: I64, k: int) -> F64:
    """1 for each target among the best k, else 0. With one target a query, recall and hit rate are its mean.

    >>> hits_at(np.array([0, 9, 10, 500]), 10).tolist()  # the best item, the tenth, the eleventh, far away
    [1.0, 1.0, 0.0, 0.0]
    """
    return (ranks < k).astype(np.float64)


def ndcg_at(ranks: I64, k: int) -> F64:
    """Discounted gain of each single target: 1 / log2(rank + 2) among the best k, else 0.

    >>> ndcg_at(np.array([0, 2, 6, 10]), 10).tolist()  # 1/log2(2), 1/log2(4), 1/log2(8), not among ten
    [1.0, 0.5, 0.3333333333333333, 0.0]
    """
    return np.where(ranks < k, 1.0 / np.log2(ranks + 2.0), 0.0)


def p90_coverage(top: I64, *, items: int) -> float:
    """The smallest fraction of the catalogue that makes up 90 % of all recommendations [Q, k] (PinnerFormer, 4.2).

    Ten recommendations over 20 items: item 7 eight times, 3 once, 5 once. Items 7 and 3 make 90 %: 2 of 20.

    >>> p90_coverage(np.array([[7, 3], [7, 5], [7, 7], [7, 7], [7, 7]]), items=20)
    0.1
    """
    counts = np.sort(np.unique(top, return_counts=True)[1])[::-1]
    reached = np.searchsorted(np.cumsum(counts), 0.9 * top.size - 1e-9)
    return float(reached + 1) / items


def interest_entropy(top: I64, interest: I64) -> F64:
    """[Q] entropy, in nats, of the interests of each query's recommendations [Q, k]; `interest` [I] maps items.

    Four results of interests a, a, b, c: -(1/2 ln 1/2 + 1/4 ln 1/4 + 1/4 ln 1/4) = 1.5 ln 2 = 1.04.

    >>> interest_entropy(np.array([[0, 1, 2, 3], [0, 1, 0, 1]]), np.array([5, 5, 6, 7])).round(2).tolist()
    [1.04, 0.0]
    """
    of_top = np.sort(interest[top], axis=1)
    query = np.repeat(np.arange(len(top)), top.shape[1])
    key = query * (int(interest.max(initial=0)) + 1) + of_top.ravel()
    groups, counts = np.unique(key, return_counts=True)
    share = counts / top.shape[1]
    entropy = np.zeros(len(top))
    np.add.at(entropy, groups // (int(interest.max(initial=0)) + 1), -share * np.log(share))
    return entropy


def bootstrap_interval(
    values: F64, groups: I64, *, seed: int, samples: int = 1_000, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the mean of values [Q], resampling whole groups [Q] (users), for one user's values hang together.

    >>> bootstrap_interval(np.ones(4), np.array([0, 0, 1, 2]), seed=1)
    (1.0, 1.0)
    """
    _, inverse = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(inverse, values), np.bincount(inverse)
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    for number in range(samples):
        weights = np.bincount(rng.integers(0, len(sizes), len(sizes)), minlength=len(sizes))
        means[number] = (weights @ sums) / (weights @ sizes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
