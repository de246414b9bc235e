"""Releases with random weights, and users whose histories grow and are corrected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from encoder.actions.columns import ACTION_DTYPE, Actions, SequenceBatch, item_key, name_code
from encoder.arrays import F32
from encoder.features import Vocabularies, padded_rows, sequence_positions
from encoder.items import TrainedItems
from encoder.model import EncoderConfig, build_encoder, initialize
from encoder.release import Release, make_release

ACTION_NAMES = ("click", "save", "hide")
SURFACES = ("home", "search")


def random_release(config: EncoderConfig, seed: int, *, items: int = 500) -> Release:
    """Return a release whose weights are all random, residual branches and biases too, so that no term is 0."""
    generator = torch.Generator().manual_seed(seed)
    keys = np.sort(np.array([item_key(f"item-{i}") for i in range(items)], np.uint64))
    vocabularies = Vocabularies(keys, ACTION_NAMES, SURFACES)
    model = build_encoder(
        config, TrainedItems(items, config.item_dim), actions=len(ACTION_NAMES), surfaces=len(SURFACES)
    )
    initialize(model, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2 and "items" not in name:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
            elif name.startswith(("items", "action", "surface")):
                parameter.normal_(0, 0.5, generator=generator)
            else:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return make_release(model, vocabularies, metrics={}, training={})


def random_actions(rng: np.random.Generator, count: int, start_ms: int = 1_700_000_000_000) -> Actions:
    """Return actions of one user, oldest first, with bursts, pauses, equal times, and one unknown item in fifty."""
    actions = np.zeros(count, ACTION_DTYPE)
    known = rng.integers(0, 500, count)
    actions["item"] = [item_key(f"item-{i}") if i >= 10 else int(rng.integers(1, 1 << 63)) for i in known]
    actions["action"] = [name_code(str(name)) for name in rng.choice([*ACTION_NAMES, "unheard"], count)]
    actions["surface"] = [name_code(str(name)) for name in rng.choice([*SURFACES, ""], count)]
    actions["duration_ms"] = rng.integers(0, 100_000, count)
    gaps_ms = np.where(rng.random(count) < 0.1, 0, np.exp(rng.uniform(0, 19, count)))
    actions["timestamp_ms"] = start_ms + np.cumsum(gaps_ms.astype(np.int64))
    return actions


@dataclass
class User:
    """A user as the state keeps it: the newest `kept_max` actions, the number of all actions, and a revision."""

    name: bytes
    actions: Actions
    kept_max: int
    count: int = field(init=False)
    revision: int = 0

    def __post_init__(self) -> None:
        self.count = len(self.actions)
        self.actions = self.actions[-self.kept_max :]

    def append(self, rng: np.random.Generator, count: int) -> None:
        """Append `count` new actions."""
        more = random_actions(rng, count, int(self.actions["timestamp_ms"][-1]))
        self.actions = np.concatenate([self.actions, more])[-self.kept_max :]
        self.count += count

    def late(self, rng: np.random.Generator) -> None:
        """Insert a late action, which belongs before actions that are kept."""
        at = int(rng.integers(1, len(self.actions) + 1))
        event = random_actions(rng, 1, int(self.actions["timestamp_ms"][at - 1]))
        event["timestamp_ms"] = self.actions["timestamp_ms"][at - 1]
        self.actions = np.concatenate([self.actions[:at], event, self.actions[at:]])[-self.kept_max :]
        self.count += 1
        self.revision += 1


def sequences(users: Sequence[User]) -> SequenceBatch:
    """Return the batch that requests these users."""
    lengths = [len(user.actions) for user in users]
    return SequenceBatch(
        users=[user.name for user in users],
        actions=np.concatenate([user.actions for user in users]),
        starts=np.cumsum([0, *lengths]).astype(np.int64),
        counts=np.array([user.count for user in users], np.int64),
        revisions=np.array([user.revision for user in users], np.int64),
    )


@torch.inference_mode()
def forward(release: Release, batch: SequenceBatch) -> F32:
    """Return the model's own forward pass over all kept actions, [U, E], with which every runtime must agree."""
    positions = sequence_positions(batch.starts, batch.counts)
    tokens = release.tokenizer.tokenize(batch.actions, batch.starts, positions)
    lengths = torch.from_numpy(np.diff(batch.starts))
    return release.model.embed(tokens.features(padded_rows(batch.starts)), lengths).numpy()
