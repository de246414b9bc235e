"""One training under way: a model, its optimizer, and one step at a time.

Everything random in a step is derived from (seed, epoch, step), so a checkpoint needs no generator's state and a
training that was killed goes on to the same result. A log in several parts (`LogParts`) is read one part at a time, in
another order in each epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from encoder.arrays import I64
from encoder.data.batches import epoch_batches
from encoder.data.log import ActionLog, LogParts
from encoder.distributed import ProcessGroup
from encoder.features import UNKNOWN, Tokens, Vocabularies
from encoder.items import ItemVectors
from encoder.model import AnyEncoder, StreamingEncoder, build_encoder, initialize
from encoder.training.cooccurrence import cooccurrence_vectors
from encoder.training.losses import SCALE_MAX, equal_user_weights, softmax_loss
from encoder.training.negatives import NegativeSampler
from encoder.training.objectives import Pairs, Positives, make_pairs
from encoder.training.recipe import Recipe


class Trainer:
    """One training under way. `step` counts optimizer steps, `tokens` the real tokens read so far.

    Batches are made on the CPU; the model and its loss are computed on the device of `group`, from the same initial weights.
    `targets` counts what this process has predicted since it began, for rates.
    """

    def __init__(
        self,
        log: LogParts,
        recipe: Recipe,
        vocabularies: Vocabularies,
        items: ItemVectors,
        *,
        group: ProcessGroup = ProcessGroup(),  # noqa: B008 (frozen)
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.recipe, self.vocabularies, self.group, self.precision = (
            recipe,
            vocabularies,
            group,
            precision,
        )
        self.device = group.device
        self._log = log
        self._read(0)
        self.model: AnyEncoder = build_encoder(
            recipe.encoder, items, actions=len(vocabularies.actions), surfaces=len(vocabularies.surfaces)
        )
        generator = torch.Generator().manual_seed(recipe.seed)
        known = len(vocabularies.item_keys)
        table = initial_items(self.tokens_of_log, self.user_of_row, recipe, items=known, generator=generator)
        initialize(self.model, generator, table)
        self.model.to(self.device)
        self.log_scale = nn.Parameter(torch.tensor(math.log(recipe.loss.scale_initial), device=self.device))
        self.optimizer = make_optimizer(self.model, self.log_scale, recipe)
        counts = log.item_counts(recipe.data.positives)
        self.positives_of_item = np.zeros(known + 1, np.int64)
        np.add.at(self.positives_of_item, vocabularies.item_rows(counts.keys), counts.counts)
        self.positives_of_item[UNKNOWN] = 0
        self.sampler = NegativeSampler(recipe.loss, self.positives_of_item, seed=recipe.seed, device=self.device)
        self.epoch = self.part_of_epoch = self.step_of_part = self.step = self.tokens = self.targets = 0

    def batches(self) -> Iterator[I64]:
        """Row matrices without end, from where the training stands; rows are those of the part that is being read."""
        while True:
            order = np.random.default_rng([self.recipe.seed, self.epoch]).permutation(self._log.parts)
            for part in order[self.part_of_epoch :].tolist():
                self._turn_to(part)
                for number, rows in enumerate(self._part_batches()):
                    if number >= self.step_of_part:
                        self.step_of_part = number + 1
                        yield rows
                self.part_of_epoch, self.step_of_part = self.part_of_epoch + 1, 0
            self.epoch, self.part_of_epoch = self.epoch + 1, 0

    def _part_batches(self) -> Iterator[I64]:
        rng = np.random.default_rng([self.recipe.seed, self.epoch, self._part])
        return epoch_batches(self.starts, self.recipe.data, rng, rank=self.group.rank, ranks=self.group.size)

    def _turn_to(self, part: int) -> None:
        """Read another part; the last one is forgotten first."""
        if part != self._part:
            del self.starts, self.user_of_row, self.tokens_of_log, self.positives
            self._read(part)

    def _read(self, part: int) -> None:
        log = self._log.part(part)
        self._part = part
        self.starts, self.user_of_row = log.starts, log.user_of_row
        self.tokens_of_log = log.tokens(self.vocabularies)
        self.positives = find_positives(log, self.tokens_of_log, self.recipe.data.positives)

    def train_step(self, rows: I64, fraction: float) -> float:
        """One optimizer step on sequences [B, L]; `fraction` of the budget is spent. Returns the loss."""
        rng = np.random.default_rng([self.recipe.seed, self.epoch, self.step, self.group.rank])
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        pairs = make_pairs(rows, self.positives, self.recipe.objective, rng)
        self.step += 1
        self.targets += len(pairs.target)
        self.tokens += self.group.total(int((rows >= 0).sum()))
        set_learning_rate(self.optimizer, self.recipe, self.step, fraction)
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros(())
        if len(pairs.target):
            loss = self.loss(rows, pairs, rng, generator)
            loss.backward()  # type: ignore[no-untyped-call]
        self.group.average_gradients([*self.model.parameters(), self.log_scale])
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip)
        self.optimizer.step()
        return float(loss.detach())

    def loss(self, rows: I64, pairs: Pairs, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        """The loss of the pairs of a batch."""
        features = self.tokens_of_log.features(rows)
        hidden_items = torch.rand(rows.shape, generator=generator) < self.recipe.data.unknown_rate
        features = replace(features, item=features.item.masked_fill(hidden_items, UNKNOWN)).to(self.device)
        lengths = self.on_device((rows >= 0).sum(axis=1))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16):
            hidden = self.model(features, lengths, make_dropout(self.recipe.optimizer.dropout, rng, self.device))
            at = hidden[self.on_device(pairs.sequence), self.on_device(pairs.place)].float()
            if self.recipe.encoder.read_out:
                at = self.read_out_half(at, rows, pairs, rng)
            embedded = self.model.head(at).float()
        users = embedded * self.log_scale.clamp(max=math.log(SCALE_MAX)).exp()
        return self.pooled_loss(users, pairs, rng)

    def on_device(self, values: npt.NDArray[Any]) -> Tensor:
        """An array as a tensor where the model is."""
        return torch.from_numpy(values).to(self.device)

    def read_out_half(self, at: Tensor, rows: I64, pairs: Pairs, rng: np.random.Generator) -> Tensor:
        """Half of the pairs as of the time of their target, half as published: one encoder learns both."""
        assert isinstance(self.model, StreamingEncoder)
        time_ms = self.tokens_of_log.time_ms
        since = self.on_device(time_ms[pairs.target] - time_ms[rows[pairs.sequence, pairs.place]])
        given = self.on_device(rng.random(len(since)) < 0.5).unsqueeze(-1)
        return torch.where(given, self.model.read_out(at, since), at)

    def pooled_loss(self, users: Tensor, pairs: Pairs, rng: np.random.Generator) -> Tensor:
        """Softmax of scaled user embeddings [P, E] over the pool of the batch."""
        targets, user_ids = self.tokens_of_log.item[pairs.target], self.user_of_row[pairs.target]
        pool = self.sampler.pool(user_ids, targets, rng)
        table = self.model.item_embeddings()
        return softmax_loss(
            users,
            table[self.on_device(targets)],
            table[pool.rows],
            self.pair_weights(user_ids).to(self.device),
            target_log_q=pool.target_log_q,
            pool_log_q=pool.log_q,
            hide=pool.hide,
            precision=self.precision,
        )

    def pair_weights(self, user_ids: I64) -> Tensor:
        """[P] weights of the pairs, summing to 1."""
        if self.recipe.loss.equal_users:
            return equal_user_weights(user_ids)
        return torch.full((len(user_ids),), 1 / len(user_ids))

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint needs, of all processes, which call it together; tensors and plain values."""
        sketch = self.sampler.sketch
        return {
            "model": self.model.state_dict(),
            "log_scale": self.log_scale.detach(),
            "optimizer": self.optimizer.state_dict(),
            "sketches": self.group.gather(torch.from_numpy(sketch.counts)),
            "sketch_totals": self.group.gather(torch.tensor(sketch.total)),
            "counters": [self.epoch, self.step, self.tokens],
            "read": [self.part_of_epoch, self.step_of_part],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state` returned."""
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            self.log_scale.copy_(state["log_scale"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.sketch.counts[:] = state["sketches"][self.group.rank].numpy()
        self.sampler.sketch.total = int(state["sketch_totals"][self.group.rank])
        self.part_of_epoch, self.step_of_part = state["read"]
        self.epoch, self.step, self.tokens = state["counters"]


def initial_items(
    tokens: Tokens, user_of_row: I64, recipe: Recipe, *, items: int, generator: torch.Generator
) -> Tensor | None:
    """The table [I + 1, V] that trained item vectors begin with, None for a random one.

    Made from the log's first part: items that do not occur in it begin at 0.
    """
    if recipe.items.source != "trained" or recipe.items.initial == "random":
        return None
    return cooccurrence_vectors(tokens.item, user_of_row, items=items, dim=recipe.encoder.item_dim, generator=generator)


def find_positives(log: ActionLog, tokens: Tokens, names: tuple[str, ...]) -> Positives:
    """The actions of a log that may be predicted: of the named types (all if none is named), on known items."""
    is_positive = (tokens.item != UNKNOWN) & log.is_of(names)
    return Positives(starts=log.starts, time_ms=tokens.time_ms, is_positive=is_positive)


def make_optimizer(model: AnyEncoder, log_scale: nn.Parameter, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; weight decay on the matrices of Linear layers alone."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    matrices = [p for p in model.parameters() if id(p) in decayed]
    others = [p for p in model.parameters() if id(p) not in decayed]
    groups = [
        {"params": matrices, "weight_decay": recipe.optimizer.weight_decay},
        {"params": [*others, log_scale], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.optimizer.lr, betas=(0.9, 0.98), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, fraction: float) -> None:
    """Linear warm-up by steps, then a cosine to zero over the budget."""
    warm = min(1.0, step / max(1, recipe.optimizer.warmup_steps))
    lr = recipe.optimizer.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    for group in optimizer.param_groups:
        group["lr"] = lr


def make_dropout(rate: float, rng: np.random.Generator, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Inverted dropout on a device that draws from `rng`, its rate rounded to 256ths; None where that is 0."""
    dropped = round(rate * 256)
    if not dropped:
        return None
    bound, scale, draw = int(dropped), 256 / (256 - dropped), make_bytes(rng, device)

    def dropout(x: Tensor) -> Tensor:
        return x * ((draw(x.shape) >= bound) * scale).to(x.dtype)

    return dropout


def make_bytes(rng: np.random.Generator, device: torch.device) -> Callable[[torch.Size], Tensor]:
    """What draws uniform bytes of a shape: from `rng` on a CPU, elsewhere from a generator there that `rng` seeds.

    A byte an element: drawing a float for each took a tenth of a step.
    """
    if device.type == "cpu":
        return lambda shape: torch.frombuffer(bytearray(rng.bytes(shape.numel())), dtype=torch.uint8).view(shape)
    generator = torch.Generator(device).manual_seed(int(rng.integers(1 << 62)))
    return lambda shape: torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)
