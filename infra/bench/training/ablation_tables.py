"""The rows of the tables of `ablations`: what is trained in several ways, and what is the same in all.

`encoders` holds the streaming encoder against PinnerFormer's window encoder, all else equal. Table 3 of PinnerFormer
(`objectives`) and table 4 (`negatives`) need recipes alone. The other two need more:

- `features` (table 6) leaves one input out: the encoder sees it as one constant, in training and when it is asked.
  Nothing else changes: the order of actions, what is predicted and how that is ranked. The attention bias by time is
  off in every row, for it would read the time of "without any time". The item is left out as an input only.
- `sasrec` (table 10) goes from SASRec (Kang, McAuley 2018) to the streaming encoder, each row the one before with one
  thing changed, and the next item as objective in all. SASRec here is the window encoder that sees items and positions
  alone, so with our projection, head, feed-forward width, learned scale, optimizer and dropout; its loss and its data
  are those published, but for a negative that the user has acted on, which is left out and not drawn again. The paper's
  row that weighs the newest output like all others together is missing.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

from encoder.data.log import ActionLog
from encoder.model import EncoderConfig
from encoder.training.negatives import LossConfig
from encoder.training.objectives import ObjectiveConfig
from encoder.training.recipe import ItemConfig, Recipe
from infra.bench.training.ablation_trainer import Ablation

SASREC_LENGTH = 200
"""Actions that SASRec reads of each user of MovieLens-1M."""
LEFT_OUT = {
    "the item": ("item",),
    "action type": ("action",),
    "surface": ("surface",),
    "duration": ("duration_ms",),
    "the clock": ("time_ms",),
    "the gap": ("gap_ms",),
    "any time": ("time_ms", "gap_ms"),
    "positions": ("position",),
}


class Table(StrEnum):
    """What varies."""

    OBJECTIVES = "objectives"
    NEGATIVES = "negatives"
    FEATURES = "features"
    SASREC = "sasrec"
    ENCODERS = "encoders"


def rows_of(table: Table, recipe: Recipe, log: ActionLog) -> dict[str, Ablation]:
    """The ablations of a table; the others are compared with the first."""
    if table is Table.FEATURES:
        return features(recipe, log)
    if table is Table.SASREC:
        return sasrec(recipe)
    if table is Table.ENCODERS:
        return encoders(recipe)
    return objectives(recipe) if table is Table.OBJECTIVES else negatives(recipe)


def objectives(recipe: Recipe) -> dict[str, Ablation]:
    """The four objectives of the paper's figure 2, and an even mix of two."""
    shares: dict[str, ObjectiveConfig] = {
        "next action": ObjectiveConfig({"next_action": 1.0}),
        "sasrec": ObjectiveConfig({"sasrec": 1.0}),
        "all action": ObjectiveConfig({"all_action": 1.0}),
        "dense all action": ObjectiveConfig({"dense_all_action": 1.0}),
        "sasrec and dense": ObjectiveConfig({"sasrec": 0.5, "dense_all_action": 0.5}),
    }
    return {name: Ablation(replace(recipe, objective=objective)) for name, objective in shares.items()}


def negatives(recipe: Recipe) -> dict[str, Ablation]:
    """Random, in-batch and mixed negatives, with and without the correction by log-Q; the same number of each."""
    kinds = {"random": (1_024, 0), "in-batch": (0, 1_024), "mixed": (512, 512)}
    return {
        f"{name}, {'log-Q' if log_q == 'exact' else 'as they are'}": Ablation(
            replace(recipe, loss=LossConfig("sampled", *sizes, log_q=log_q, scale_initial=recipe.loss.scale_initial))
        )
        for name, sizes in kinds.items()
        for log_q in ("none", "exact")
    }


def features(recipe: Recipe, log: ActionLog) -> dict[str, Ablation]:
    """All inputs, and all but one of those that the log has."""
    recipe = replace(recipe, encoder=replace(recipe.encoder, time_bias=False))
    varies = {"action": len(log.action_names) > 1, "surface": len(log.surface_names) > 1}
    varies["duration_ms"] = bool(log.actions["duration_ms"].any())
    left_out = {f"without {name}": each for name, each in LEFT_OUT.items() if varies.get(each[0], True)}
    return {name: Ablation(recipe, hidden=hidden) for name, hidden in {"all features": (), **left_out}.items()}


def encoders(recipe: Recipe) -> dict[str, Ablation]:
    """PinnerFormer as published and the streaming encoder: the same size, data, objective and loss."""
    return {"window encoder": Ablation(replace(recipe, encoder=window(recipe))), "streaming encoder": Ablation(recipe)}


def window(recipe: Recipe) -> EncoderConfig:
    """The window encoder of the recipe's size that sees a whole chunk in every layer."""
    length, layers = recipe.data.chunk, len(recipe.encoder.windows)
    return replace(recipe.encoder, kind="window", windows=(length,) * layers, sequence_length=length, time_bias=False)


def sasrec(recipe: Recipe) -> dict[str, Ablation]:
    """From SASRec to the streaming encoder, one change at a time; every position weighs the same."""
    length = SASREC_LENGTH
    streaming = replace(
        recipe,
        data=replace(recipe.data, chunk=length),
        objective=ObjectiveConfig({"sasrec": 1.0}),
        loss=LossConfig("full", scale_initial=recipe.loss.scale_initial, equal_users=False),
    )
    pinnerformer = replace(streaming, encoder=window(streaming))
    catalogue = replace(pinnerformer, items=ItemConfig("trained", "random"))
    sampled = replace(catalogue, loss=replace(recipe.loss, equal_users=False))
    alone = ("action", "surface", "duration_ms", "time_ms", "gap_ms")
    return {
        "SASRec, binary cross-entropy": Ablation(sampled, alone, last=length, binary=True),
        "sampled softmax with log-Q": Ablation(sampled, alone, last=length),
        "softmax over the catalogue": Ablation(catalogue, alone, last=length),
        "whole histories in chunks": Ablation(catalogue, alone),
        "items begun from co-occurrence": Ablation(pinnerformer, alone),
        "all features (window encoder)": Ablation(pinnerformer),
        "streaming encoder": Ablation(streaming),
    }
