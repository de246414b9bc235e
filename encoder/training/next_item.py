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

from encoder.features import UNKNOWN, Ints, Tokens, Vocabularies
from encoder.model import AnyEncoder
from encoder.ranking import hits_at, ndcg_at, p90_coverage, target_ranks, top_items
from encoder.training.log import DAY_MS, ActionLog
from encoder.training.queries import embeddings_after, items_before
from encoder.training.splits import Questions

MISSED = np.iinfo(np.int64).max
POPULAR_DAYS = 7
SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


@dataclass(frozen=True, slots=True)
class Scores:
    """Means over the questions, and each question's rank."""

    hr10: float
    ndcg10: float
    ranks: Ints

    @classmethod
    def of(cls, ranks: Ints) -> Scores:
        return cls(float(hits_at(ranks, 10).mean()), float(ndcg_at(ranks, 10).mean()), ranks)


class Exam:
    """The questions of one log for any number of encoders with one vocabulary."""

    def __init__(self, log: ActionLog, vocabularies: Vocabularies, questions: Questions, *, hide_seen: bool) -> None:
        self.log, self.questions = log, questions
        self.tokens: Tokens = log.tokens(vocabularies)
        self.items = len(vocabularies.item_keys)
        self.answers = self.tokens.item[questions.answer]
        self.known = self.answers != UNKNOWN
        self._seen = self._hidden() if hide_seen else None

    def encoder_scores(self, model: AnyEncoder, *, time_given: bool = False) -> Scores:
        """How the encoder's embedding after each asked action ranks the answer."""
        with torch.inference_mode():
            queries = embeddings_after(model, self.tokens, self.log.starts, self.asked, self._since(time_given))
            items = model.item_embeddings().float()[1:].clone()
        return Scores.of(self._full(target_ranks(queries, items, self.answers[self.known] - 1, self._seen)))

    def coverage(self, model: AnyEncoder) -> float:
        """P90 coverage@10 of the recommendations after the asked actions."""
        with torch.inference_mode():
            queries = embeddings_after(model, self.tokens, self.log.starts, self.asked)
            items = model.item_embeddings().float()[1:].clone()
        return p90_coverage(top_items(queries, items, 10, self._seen), items=self.items)

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
                torch.ones(len(mine), 1), torch.from_numpy(counts)[:, None], targets[mine], hidden
            )
        return Scores.of(self._full(ranks))

    @property
    def asked(self) -> Ints:
        asked: Ints = self.questions.asked[self.known]
        return asked

    def _since(self, time_given: bool) -> Ints | None:
        if not time_given:
            return None
        time_ms = self.tokens.time_ms
        since_ms: Ints = time_ms[self.questions.answer[self.known]] - time_ms[self.asked]
        return since_ms

    def _full(self, ranks: Ints) -> Ints:
        all_ranks = np.full(len(self.known), MISSED)
        all_ranks[self.known] = ranks
        return all_ranks

    def _hidden(self) -> tuple[Ints, Ints]:
        query, item = items_before(self.tokens, self.log.starts, self.asked)
        return query[item != UNKNOWN], item[item != UNKNOWN] - 1


def _pairs_of(pairs: tuple[Ints, Ints], queries: Ints) -> tuple[Ints, Ints]:
    """The pairs (query, item) of ascending `queries`, which are numbered anew from 0."""
    first, last = (np.searchsorted(pairs[0], queries, side=side) for side in SIDES)
    sizes = last - first
    query = np.repeat(np.arange(len(queries)), sizes)
    at = np.arange(len(query)) + np.repeat(first - (np.cumsum(sizes) - sizes), sizes)
    return query, pairs[1][at]
