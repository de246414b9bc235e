"""Trainer: a model, its optimizer, and one optimizer step at a time.

All randomness of a step is derived from (seed, epoch, step), so a checkpoint stores no generator state and a training
that was killed resumes to the same weights. A log in several parts (`LogParts`) is read one part at a time, in a
different order in each epoch.

Shapes: B sequences, L actions, P pairs (an output and the action it predicts), D model, E embedding, V item vector,
I items.
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
    """A model in training, with its optimizer, its data and its counters.

    `step` counts optimizer steps and `tokens` the real (not padded) tokens read by all processes. `targets` counts the
    actions that this process has predicted, to compute rates. Batches are built on the CPU; the model and the loss
    are computed on the device of `group`. Every process starts from the same weights.
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
        self.recipe, self.vocabularies, self.group, self.precision = recipe, vocabularies, group, precision
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
        """Yield row matrices [B, L] without end, starting at the counters; rows index the part being read."""
        while True:
            order = np.random.default_rng([self.recipe.seed, self.epoch]).permutation(self._log.parts)
            for part in order[self.part_of_epoch :].tolist():
                self._switch_to(part)
                for number, rows in enumerate(self._part_batches()):
                    if number >= self.step_of_part:
                        self.step_of_part = number + 1
                        yield rows
                self.part_of_epoch, self.step_of_part = self.part_of_epoch + 1, 0
            self.epoch, self.part_of_epoch = self.epoch + 1, 0

    def _part_batches(self) -> Iterator[I64]:
        rng = np.random.default_rng([self.recipe.seed, self.epoch, self._part])
        return epoch_batches(self.starts, self.recipe.data, rng, rank=self.group.rank, ranks=self.group.size)

    def _switch_to(self, part: int) -> None:
        """Read a part unless it is the current one; the current one is released first, to hold only one in memory."""
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
        """Take one optimizer step on sequences [B, L] of rows (-1: padding) and return the loss.

        `fraction` is the share of the budget already spent; the learning rate depends on it.
        """
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
        """Return the loss of the pairs [P] of a batch of sequences [B, L]."""
        features = self.tokens_of_log.features(rows)
        masked = torch.rand(rows.shape, generator=generator) < self.recipe.data.unknown_rate  # [B, L]
        features = replace(features, item=features.item.masked_fill(masked, UNKNOWN)).to(self.device)
        lengths = self.on_device((rows >= 0).sum(axis=1))  # [B]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16):
            dropout = make_dropout(self.recipe.optimizer.dropout, rng, self.device)
            hidden = self.model(features, lengths, dropout)  # [B, L, D]
            outputs = hidden[self.on_device(pairs.sequence), self.on_device(pairs.position)].float()  # [P, D]
            if self.recipe.encoder.read_out:
                outputs = self.read_out_half(outputs, rows, pairs, rng)
            embedded = self.model.head(outputs).float()  # [P, E]
        users = embedded * self.log_scale.clamp(max=math.log(SCALE_MAX)).exp()
        return self.pooled_loss(users, pairs, rng)

    def on_device(self, values: npt.NDArray[Any]) -> Tensor:
        """Return an array as a tensor on the device of the model."""
        return torch.from_numpy(values).to(self.device)

    def read_out_half(self, outputs: Tensor, rows: I64, pairs: Pairs, rng: np.random.Generator) -> Tensor:
        """Apply the read-out to a random half of the outputs [P, D], at the time of their target.

        The other half stays as it is, so that one encoder learns to embed with and without the time of the request.
        """
        assert isinstance(self.model, StreamingEncoder)
        time_ms = self.tokens_of_log.time_ms
        output_ms = time_ms[rows[pairs.sequence, pairs.position]]  # [P] time of the action at each output
        since_ms = self.on_device(time_ms[pairs.target] - output_ms)
        time_given = self.on_device(rng.random(len(since_ms)) < 0.5).unsqueeze(-1)  # [P, 1]
        return torch.where(time_given, self.model.read_out(outputs, since_ms), outputs)

    def pooled_loss(self, users: Tensor, pairs: Pairs, rng: np.random.Generator) -> Tensor:
        """Return the softmax loss of scaled user embeddings [P, E] over the negative pool of the batch."""
        targets, user_ids = self.tokens_of_log.item[pairs.target], self.user_of_row[pairs.target]
        pool = self.sampler.pool(user_ids, targets, rng)
        table = self.model.item_embeddings()  # [I + 1, E]
        return softmax_loss(
            users,
            table[self.on_device(targets)],
            table[pool.rows],
            self.pair_weights(user_ids).to(self.device),
            target_log_q=pool.target_log_q,
            pool_log_q=pool.log_q,
            mask=pool.mask,
            precision=self.precision,
        )

    def pair_weights(self, user_ids: I64) -> Tensor:
        """Return the weights of the pairs [P], which sum to 1."""
        if self.recipe.loss.equal_users:
            return equal_user_weights(user_ids)
        return torch.full((len(user_ids),), 1 / len(user_ids))

    def state(self) -> dict[str, Any]:
        """Return everything that a checkpoint stores, as tensors and plain values.

        This is a collective call: the sketches of all processes are gathered.
        """
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
        """Restore the model, the optimizer and the counters that `state` returned."""
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
    """Return the initial table [I + 1, V] of trained item vectors, or None for a random one.

    The table is computed from the first part of the log; items that do not occur in that part start at 0.
    """
    if recipe.items.source != "trained" or recipe.items.initial == "random":
        return None
    return cooccurrence_vectors(tokens.item, user_of_row, items=items, dim=recipe.encoder.item_dim, generator=generator)


def find_positives(log: ActionLog, tokens: Tokens, names: tuple[str, ...]) -> Positives:
    """Return the actions that may be predicted: of the named types (all types if none is named) and on known items."""
    is_positive = (tokens.item != UNKNOWN) & log.is_of(names)
    return Positives(starts=log.starts, time_ms=tokens.time_ms, is_positive=is_positive)


def make_optimizer(model: AnyEncoder, log_scale: nn.Parameter, recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on the matrices of Linear layers only."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    matrices = [p for p in model.parameters() if id(p) in decayed]
    others = [p for p in model.parameters() if id(p) not in decayed]
    groups = [
        {"params": matrices, "weight_decay": recipe.optimizer.weight_decay},
        {"params": [*others, log_scale], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.optimizer.lr, betas=(0.9, 0.98), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, fraction: float) -> None:
    """Set the learning rate: linear warm-up over the first steps, times a cosine to zero over the budget."""
    warm = min(1.0, step / max(1, recipe.optimizer.warmup_steps))
    lr = recipe.optimizer.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    for group in optimizer.param_groups:
        group["lr"] = lr


def make_dropout(rate: float, rng: np.random.Generator, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Return inverted dropout driven by `rng`, or None if the rate rounds to 0.

    The rate is rounded to a multiple of 1/256, because one random byte decides about each element.
    """
    dropped = round(rate * 256)
    if not dropped:
        return None
    bound, scale, draw = int(dropped), 256 / (256 - dropped), make_bytes(rng, device)

    def dropout(x: Tensor) -> Tensor:
        return x * ((draw(x.shape) >= bound) * scale).to(x.dtype)

    return dropout


def make_bytes(rng: np.random.Generator, device: torch.device) -> Callable[[torch.Size], Tensor]:
    """Return a function that draws uniform random bytes of a given shape.

    On a CPU the bytes come from `rng`; on another device, from a generator there that `rng` seeds. One byte per
    element, because drawing a float for each element took a tenth of the training step.
    """
    if device.type == "cpu":
        return lambda shape: torch.frombuffer(bytearray(rng.bytes(shape.numel())), dtype=torch.uint8).view(shape)
    generator = torch.Generator(device).manual_seed(int(rng.integers(1 << 62)))
    return lambda shape: torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)
