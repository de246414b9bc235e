"""Trainer for the ablations that a recipe cannot express: masked inputs, and SASRec's data and loss.

The shipped encoder and its trainer have no options for these; the subclasses here change them. Every ablation reads the
same number of tokens, runs without validation, and keeps its final weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from encoder.arrays import I64
from encoder.data.batches import epoch_batches
from encoder.data.log import ActionLog
from encoder.features import Features, Tokens
from encoder.training.objectives import Pairs
from encoder.training.recipe import Recipe
from encoder.training.run import Progress
from encoder.training.sources import make_items
from encoder.training.trainer import Trainer

CONSTANT = {"time_ms": 10**12}
"""Constant value of a masked column, 0 if not named here; the logarithm of this time is the origin of the clock's."""
WHOLE = 1 << 40
"""Chunk length at which practically no history is cut by a random phase."""


@dataclass(frozen=True, slots=True)
class Ablation:
    """One row of a table: a recipe and what it cannot express."""

    recipe: Recipe
    masked: tuple[str, ...] = ()
    """Columns of `Features` that the encoder reads as a constant, in training and in evaluation."""
    last: int = 0
    """Number of each user's last actions to train on, in one sequence; 0 trains on all actions, in chunks."""
    binary: bool = False
    """Whether to use SASRec's binary cross-entropy instead of the recipe's loss."""


@dataclass(frozen=True)
class TokensWithout(Tokens):
    """Tokens with some columns masked for the encoder; order, targets and times for everything else are unchanged."""

    masked: tuple[str, ...] = ()

    def features(self, rows: I64 | None = None) -> Features:
        """Return the features of rows, with each masked column set to its constant."""
        features = super().features(rows)
        constant = {name: torch.full_like(getattr(features, name), CONSTANT.get(name, 0)) for name in self.masked}
        return replace(features, **constant)


def without(tokens: Tokens, masked: tuple[str, ...]) -> TokensWithout:
    """Return the tokens with the `masked` columns masked."""
    return TokensWithout(**{name: getattr(tokens, name) for name in Tokens.__slots__}, masked=masked)


class AblationTrainer(Trainer):
    """The trainer of an ablation; the vocabularies come from the whole `log`, even if only part of it is trained on."""

    def __init__(self, log: ActionLog, ablation: Ablation, precision: torch.dtype) -> None:
        vocabularies, items = make_items(log, ablation.recipe)
        trained = last_actions(log, ablation.last) if ablation.last else log
        super().__init__(trained, ablation.recipe, vocabularies, items, precision=precision)
        self.ablation = ablation
        self.tokens_of_log = without(self.tokens_of_log, ablation.masked)
        # [U, I + 1] whether a user has acted on an item
        self._acted_on = np.zeros((len(log.users), len(vocabularies.item_keys) + 1), np.bool_)
        self._acted_on[log.user_of_row, vocabularies.item_rows(log.actions["item"])] = True

    def _part_batches(self) -> Iterator[I64]:
        if not self.ablation.last:
            return super()._part_batches()
        rng = np.random.default_rng([self.recipe.seed, self.epoch])
        return epoch_batches(self.starts, replace(self.recipe.data, chunk=WHOLE), rng)

    def pooled_loss(self, users: Tensor, pairs: Pairs, rng: np.random.Generator) -> Tensor:
        """Return the recipe's loss, or the binary cross-entropy of each positive and one uniform negative.

            loss = sum_p w_p * ( softplus(-s_positive) + softplus(s_negative) )

        An item that the user has acted on is not a negative (SASRec: arXiv 1808.09781). SASRec draws another item in
        that case; here the term is left out.
        """
        if not self.ablation.binary:
            return super().pooled_loss(users, pairs, rng)
        user, positive = self.user_of_row[pairs.target], self.tokens_of_log.item[pairs.target]
        table = self.model.item_embeddings()  # [I + 1, E]
        negative = rng.integers(1, len(table), len(positive))  # [P]
        is_negative = torch.from_numpy(~self._acted_on[user, negative])
        own, other = ((users * table[torch.from_numpy(rows)]).sum(-1) for rows in (positive, negative))
        return (self.pair_weights(user) * (F.softplus(-own) + is_negative * F.softplus(other))).sum()


def last_actions(log: ActionLog, count: int) -> ActionLog:
    """Return the last `count` actions of each user, or all if there are fewer."""
    from_the_end = log.starts[1:][log.user_of_row] - np.arange(len(log))  # [N] 1 for the newest row of a user
    return log.select(from_the_end <= count)


def train(
    log: ActionLog, ablation: Ablation, precision: torch.dtype, progress: Callable[[Progress], None] = lambda _: None
) -> AblationTrainer:
    """Train an ablation until the token budget of its recipe is spent."""
    trainer, started = AblationTrainer(log, ablation, precision), time.monotonic()
    for rows in trainer.batches():
        fraction = trainer.tokens / ablation.recipe.budget.tokens_max
        loss = trainer.train_step(rows, fraction)
        fraction = min(1.0, trainer.tokens / ablation.recipe.budget.tokens_max)
        seconds = time.monotonic() - started
        progress(Progress(trainer.epoch, trainer.step, trainer.tokens, fraction, seconds, loss, None))
        if fraction >= 1:
            break
    return trainer
