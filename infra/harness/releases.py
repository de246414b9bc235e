"""Releases with random weights, for tests and benchmarks whose subject is what the encoder is given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from encoder.actions.columns import item_key
from encoder.features import Vocabularies
from encoder.items import TrainedItems
from encoder.model import EncoderConfig, build_encoder, initialize
from encoder.release import Release, make_release

ACTION_NAMES = ("view", "click", "save")
SURFACES = ("home", "search")
ITEMS = 1_000


def vocabularies(
    items: int = ITEMS, actions: Sequence[str] = ACTION_NAMES, surfaces: Sequence[str] = SURFACES
) -> Vocabularies:
    """Return vocabularies whose items are `item-0`, `item-1` and so on."""
    keys = np.sort(np.array([item_key(f"item-{number}") for number in range(items)], np.uint64))
    return Vocabularies(keys, tuple(actions), tuple(surfaces))


def random_release(
    config: EncoderConfig, known: Vocabularies | None = None, *, seed: int = 0, noise: float = 1.0
) -> Release:
    """Return a release with random weights; `known` are its vocabularies, `vocabularies()` if None.

    Weights are those with which training begins, plus noise: a standard deviation of `noise` / sqrt(inputs) for
    matrices, of a tenth of `noise` for vectors. At 1 every action moves the embedding; at 0 the branches of all blocks
    add nothing to the residual stream, as in an untrained model.
    """
    known = known or vocabularies()
    generator = torch.Generator().manual_seed(seed)
    items = TrainedItems(len(known.item_keys), config.item_dim)
    model = build_encoder(config, items, actions=len(known.actions), surfaces=len(known.surfaces))
    initialize(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1
            parameter.add_(torch.empty_like(parameter).normal_(0, 1, generator=generator) * scale, alpha=noise)
    return make_release(model, known, metrics={}, training={})
