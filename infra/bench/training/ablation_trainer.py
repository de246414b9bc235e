"""What the rows of `ablation_tables` change that no recipe can: inputs left out, and SASRec's data and loss.

The shipped encoder and its training have no option for any of it; here they are told something else. Every ablation
reads the same number of tokens, is not validated on the way, and keeps the weights it ends with.
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
"""What a hidden column reads, 0 where none is named: a time whose logarithm the clock centres on."""
WHOLE = 1 << 40
"""A chunk so long that no random phase ever cuts a history."""


@dataclass(frozen=True, slots=True)
class Ablation:
    """One row of a table."""

    recipe: Recipe
    hidden: tuple[str, ...] = ()
    """Columns of `Features` that the encoder sees as one constant, in training and when it is asked."""
    last: int = 0
    """Each user's last so many actions are trained on alone, in one piece; 0: all of them, in chunks."""
    binary: bool = False
    """SASRec's loss in place of the recipe's."""


@dataclass(frozen=True)
class TokensWithout(Tokens):
    """Tokens of which the encoder does not see some columns; order, targets and their times stay what they are."""

    hidden: tuple[str, ...] = ()

    def features(self, rows: I64 | None = None) -> Features:
        seen = super().features(rows)
        constant = {name: torch.full_like(getattr(seen, name), CONSTANT.get(name, 0)) for name in self.hidden}
        return replace(seen, **constant)


def without(tokens: Tokens, hidden: tuple[str, ...]) -> TokensWithout:
    """Tokens whose `hidden` columns the encoder does not see."""
    return TokensWithout(**{name: getattr(tokens, name) for name in Tokens.__slots__}, hidden=hidden)


class AblationTrainer(Trainer):
    """The trainer of an ablation; `log` decides the vocabularies, also where less of it is trained on."""

    def __init__(self, log: ActionLog, ablation: Ablation, precision: torch.dtype) -> None:
        vocabularies, items = make_items(log, ablation.recipe)
        trained = last_actions(log, ablation.last) if ablation.last else log
        super().__init__(trained, ablation.recipe, vocabularies, items, precision=precision)
        self.ablation = ablation
        self.tokens_of_log = without(self.tokens_of_log, ablation.hidden)
        self._acted_on = np.zeros((len(log.users), len(vocabularies.item_keys) + 1), np.bool_)
        self._acted_on[log.user_of_row, vocabularies.item_rows(log.actions["item"])] = True

    def _part_batches(self) -> Iterator[I64]:
        if not self.ablation.last:
            return super()._part_batches()
        rng = np.random.default_rng([self.recipe.seed, self.epoch])
        return epoch_batches(self.starts, replace(self.recipe.data, chunk=WHOLE), rng)

    def pooled_loss(self, users: Tensor, pairs: Pairs, rng: np.random.Generator) -> Tensor:
        """The recipe's loss, or binary cross-entropy of each positive and one uniform item of its own.

        An item that the user has acted on is no negative (Kang, McAuley 2018): SASRec draws again, here the term is
        left out.
        """
        if not self.ablation.binary:
            return super().pooled_loss(users, pairs, rng)
        user, positive = self.user_of_row[pairs.target], self.tokens_of_log.item[pairs.target]
        table = self.model.item_embeddings()
        negative = rng.integers(1, len(table), len(positive))
        is_negative = torch.from_numpy(~self._acted_on[user, negative])
        own, other = ((users * table[torch.from_numpy(rows)]).sum(-1) for rows in (positive, negative))
        return (self.pair_weights(user) * (F.softplus(-own) + is_negative * F.softplus(other))).sum()


def last_actions(log: ActionLog, most: int) -> ActionLog:
    """The last actions of each user, at most so many."""
    return log.select(log.starts[1:][log.user_of_row] - np.arange(len(log)) <= most)


def train(
    log: ActionLog, ablation: Ablation, precision: torch.dtype, progress: Callable[[Progress], None] = lambda _: None
) -> AblationTrainer:
    """Train an ablation until the tokens of its recipe are spent."""
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
