"""Full ranking of the item that came next, beside what popularity alone would have said.

Items on which the user had already acted are left out of the ranking where a log never repeats one (`hide_seen`). An
answer that the encoder does not know is a miss. Scores that read the time of the request ("time-given") are computed
by their own call and never mixed with those that do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from encoder.arrays import I64
from encoder.data.log import DAY_MS, ActionLog
from encoder.data.split import Questions
from encoder.evaluation.queries import embeddings_after, items_before
from encoder.evaluation.ranking import hits_at, ndcg_at, target_ranks, top_items
from encoder.features import UNKNOWN, Tokens, Vocabularies
from encoder.model import AnyEncoder

MISSED = np.iinfo(np.int64).max
POPULAR_DAYS = 7
SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


@dataclass(frozen=True, slots=True)
class Scores:
    """Means over the questions, and each question's rank."""

    hr10: float
    ndcg10: float
    ranks: I64

    @classmethod
    def of(cls, ranks: I64) -> Scores:
        return cls(float(hits_at(ranks, 10).mean()), float(ndcg_at(ranks, 10).mean()), ranks)


class NextItemEvaluator:
    """The questions of one log for any number of encoders with one vocabulary."""

    def __init__(
        self,
        log: ActionLog,
        vocabularies: Vocabularies,
        questions: Questions,
        *,
        hide_seen: bool,
        candidates: I64 | None = None,
    ) -> None:
        """`candidates` are rows of the vocabulary's items, from 0, among which answers are ranked; None takes all."""
        self.log, self.questions, self.candidates = log, questions, candidates
        self.tokens: Tokens = log.tokens(vocabularies)
        self.items = len(vocabularies.item_keys)
        self.answers = self.tokens.item[questions.answer]
        self.known = self.answers != UNKNOWN
        self._seen = self._hidden() if hide_seen else None

    @torch.inference_mode()
    def queries(self, model: AnyEncoder, *, time_given: bool = False) -> Tensor:
        """[K, E]: the encoder's embedding after the asked action of each question whose answer is known."""
        since_ms = None
        if time_given:
            time_ms = self.tokens.time_ms
            since_ms = time_ms[self.questions.answer[self.known]] - time_ms[self.asked]
        return embeddings_after(model, self.tokens, self.log.starts, self.asked, since_ms)

    def encoder_scores(self, model: AnyEncoder, *, time_given: bool = False) -> Scores:
        """How the encoder's embedding after each asked action ranks the answer."""
        return self.scores(self.queries(model, time_given=time_given), known_items(model))

    def scores(self, queries: Tensor, items: Tensor) -> Scores:
        """How queries [K, E] rank the answers among items [I, E]."""
        ranks = target_ranks(queries, items, self.answers[self.known] - 1, self._seen, self.candidates)
        return Scores.of(self._full(ranks))

    def top(self, queries: Tensor, items: Tensor, k: int) -> I64:
        """[K, k] rows of the items that queries [K, E] rank highest, from 0."""
        return top_items(queries, items, k, self._seen)

    def popularity_scores(self) -> Scores:
        """The same ranking by how often an item was acted on in the seven days before the day of the answer."""
        day = self.log.actions["timestamp_ms"] // DAY_MS
        order = np.argsort(day, kind="stable")
        days = day[self.questions.answer[self.known]]
        targets = self.answers[self.known] - 1
        ranks = np.empty(len(days), np.int64)
        for value in np.unique(days):
            first, last = np.searchsorted(day[order], [value - POPULAR_DAYS, value])
            seen = self.tokens.item[order[first:last]]
            counts = np.bincount(seen[seen != UNKNOWN] - 1, minlength=self.items).astype(np.float32)
            mine = np.flatnonzero(days == value)
            hidden = None if self._seen is None else _pairs_of(self._seen, mine)
            ranks[mine] = target_ranks(
                torch.ones(len(mine), 1), torch.from_numpy(counts)[:, None], targets[mine], hidden, self.candidates
            )
        return Scores.of(self._full(ranks))

    @property
    def asked(self) -> I64:
        """[K] the newest action of each question whose answer is known."""
        asked: I64 = self.questions.asked[self.known]
        return asked

    def _full(self, ranks: I64) -> I64:
        all_ranks = np.full(len(self.known), MISSED)
        all_ranks[self.known] = ranks
        return all_ranks

    def _hidden(self) -> tuple[I64, I64]:
        return known_pairs(items_before(self.tokens, self.log.starts, self.asked))


def known_items(model: AnyEncoder) -> Tensor:
    """[I, E] embeddings of the known items, without the unknown one, on the CPU."""
    with torch.inference_mode():
        return model.item_embeddings().float()[1:].to("cpu", copy=True)


def known_pairs(pairs: tuple[I64, I64]) -> tuple[I64, I64]:
    """The pairs (query, item row) of known items, items numbered from 0."""
    query, item = pairs
    return query[item != UNKNOWN], item[item != UNKNOWN] - 1


def _pairs_of(pairs: tuple[I64, I64], queries: I64) -> tuple[I64, I64]:
    """The pairs (query, item) of ascending `queries`, which are numbered anew from 0."""
    first, last = (np.searchsorted(pairs[0], queries, side=side) for side in SIDES)
    sizes = last - first
    query = np.repeat(np.arange(len(queries)), sizes)
    at = np.arange(len(query)) + np.repeat(first - (np.cumsum(sizes) - sizes), sizes)
    return query, pairs[1][at]
