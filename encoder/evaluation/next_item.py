"""Next-item evaluation: the rank of the item that came next among all items, for an encoder and for popularity.

Items that the user has already acted on are masked if `mask_seen` is set, which is right for logs in which a user never
acts on an item twice. A target that the encoder does not know is a miss. Scores that use the time of the request
("time-given") come from a call of their own and are never mixed with the others.

Shapes: N actions, Q queries, K queries whose target is known, E embedding, I items.
Item rows run from 1 in `Tokens` (0 is the unknown item) and from 0 in rankings, which leave the unknown item out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from encoder.arrays import I64
from encoder.data.log import DAY_MS, ActionLog
from encoder.data.split import Queries
from encoder.evaluation.queries import embeddings_after, items_before
from encoder.evaluation.ranking import hits_at, ndcg_at, target_ranks, top_items
from encoder.features import UNKNOWN, Tokens, Vocabularies
from encoder.model import AnyEncoder

MISSED = np.iinfo(np.int64).max
"""Rank of a target that the encoder does not know."""
POPULAR_DAYS = 7
SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


@dataclass(frozen=True, slots=True)
class Scores:
    """Mean metrics over the queries, and the rank of each target."""

    hr10: float
    ndcg10: float
    ranks: I64
    """[Q] rank of each target, from 0; `MISSED` if its item is unknown."""

    @classmethod
    def of(cls, ranks: I64) -> Scores:
        """Return the scores of ranks [Q]."""
        return cls(float(hits_at(ranks, 10).mean()), float(ndcg_at(ranks, 10).mean()), ranks)


class NextItemEvaluator:
    """Ranks the targets of one set of queries for any number of encoders with one vocabulary."""

    def __init__(
        self,
        log: ActionLog,
        vocabularies: Vocabularies,
        queries: Queries,
        *,
        mask_seen: bool,
        candidates: I64 | None = None,
    ) -> None:
        """Prepare the queries; `candidates` are item rows, from 0, to rank among, or None for all items."""
        self.log, self.queries, self.candidates = log, queries, candidates
        self.tokens: Tokens = log.tokens(vocabularies)
        self.items = len(vocabularies.item_keys)
        self.target_items = self.tokens.item[queries.target]  # [Q]
        self.known = self.target_items != UNKNOWN  # [Q]
        self._seen = known_pairs(items_before(self.tokens, log.starts, self.newest)) if mask_seen else None

    @torch.inference_mode()
    def query_vectors(self, model: AnyEncoder, *, time_given: bool = False) -> Tensor:
        """Return the user embedding [K, E] at each query whose target is known."""
        since_ms = None
        if time_given:
            time_ms = self.tokens.time_ms
            since_ms = time_ms[self.queries.target[self.known]] - time_ms[self.newest]
        return embeddings_after(model, self.tokens, self.log.starts, self.newest, since_ms)

    def encoder_scores(self, model: AnyEncoder, *, time_given: bool = False) -> Scores:
        """Return the scores of an encoder."""
        return self.scores(self.query_vectors(model, time_given=time_given), known_items(model))

    def scores(self, vectors: Tensor, items: Tensor) -> Scores:
        """Return the scores of query vectors [K, E] against item vectors [I, E]."""
        targets = self.target_items[self.known] - 1
        return Scores.of(self._all_ranks(target_ranks(vectors, items, targets, self._seen, self.candidates)))

    def top_items(self, vectors: Tensor, items: Tensor, k: int) -> I64:
        """Return the rows [K, k], from 0, of the items that query vectors [K, E] rank highest."""
        return top_items(vectors, items, k, self._seen)

    def popularity_scores(self) -> Scores:
        """Return the scores of a baseline: items ranked by their actions in the seven days before the target's day."""
        day = self.log.actions["timestamp_ms"] // DAY_MS  # [N]
        order = np.argsort(day, kind="stable")  # [N] rows by day
        days = day[self.queries.target[self.known]]  # [K]
        targets = self.target_items[self.known] - 1
        ranks = np.empty(len(days), np.int64)
        for value in np.unique(days):  # all queries of one day share the counts
            first, last = np.searchsorted(day[order], [value - POPULAR_DAYS, value])
            recent = self.tokens.item[order[first:last]]
            counts = np.bincount(recent[recent != UNKNOWN] - 1, minlength=self.items).astype(np.float32)  # [I]
            today = np.flatnonzero(days == value)
            masked = None if self._seen is None else _pairs_of(self._seen, today)
            # A count is the score of an item for every query: 1-d vectors, [queries, 1] @ [1, I].
            ranks[today] = target_ranks(
                torch.ones(len(today), 1), torch.from_numpy(counts)[:, None], targets[today], masked, self.candidates
            )
        return Scores.of(self._all_ranks(ranks))

    @property
    def newest(self) -> I64:
        """[K] newest row of each query whose target is known."""
        newest: I64 = self.queries.newest[self.known]
        return newest

    def _all_ranks(self, ranks: I64) -> I64:
        """Extend ranks [K] to all queries [Q]; the others are misses."""
        all_ranks = np.full(len(self.known), MISSED)
        all_ranks[self.known] = ranks
        return all_ranks


def known_items(model: AnyEncoder) -> Tensor:
    """Return the embeddings [I, E] of the known items on the CPU, without the unknown item."""
    with torch.inference_mode():
        return model.item_embeddings().float()[1:].to("cpu", copy=True)


def known_pairs(pairs: tuple[I64, I64]) -> tuple[I64, I64]:
    """Drop the pairs (query, item row) of the unknown item and number the items from 0."""
    query, item = pairs
    return query[item != UNKNOWN], item[item != UNKNOWN] - 1


def _pairs_of(pairs: tuple[I64, I64], queries: I64) -> tuple[I64, I64]:
    """Return the pairs (query, item) of the ascending `queries`, which are renumbered from 0.

    pairs[0]   0 0 0 1 1 2 2 2 2 3      queries = [0, 2]
    first      0         5              the pairs of query 2 are pairs[first[1]:last[1]]
    result     0 0 0     1 1 1 1
    """
    first, last = (np.searchsorted(pairs[0], queries, side=side) for side in SIDES)
    sizes = last - first
    query = np.repeat(np.arange(len(queries)), sizes)
    # Position i of the result, less the result's offset of its query, plus the offset of that query in `pairs`.
    at = np.arange(len(query)) + np.repeat(first - (np.cumsum(sizes) - sizes), sizes)
    return query, pairs[1][at]
