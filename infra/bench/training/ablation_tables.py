"""Rows of the tables of `ablations`: what each row changes, and what is the same in all rows.

`encoders` compares the streaming encoder with PinnerFormer's window encoder, everything else equal. The tables after
PinnerFormer's table 3 (`objectives`) and table 4 (`negatives`) only need recipes (arXiv 2205.04507). Two need more:

- `features` (table 6) leaves out one input: the encoder reads it as a constant, in training and in evaluation. The
  order of actions, the targets and the ranking do not change. The attention bias by time is off in every row, because
  it would read the time even in the row "without any time". The item is left out as an input only.
- `sasrec` (table 10) leads from SASRec (Kang, McAuley 2018, arXiv 1808.09781) to the streaming encoder; each row
  changes one thing in the row before it, and the objective of all rows is the next item. "SASRec" here is the window
  encoder with only items and positions as inputs; it keeps our projection, head, feed-forward width, learned scale,
  optimizer and dropout. Its loss and its data are as published, except that a negative on which the user has acted is
  dropped instead of drawn again. The paper's row that weighs the newest output as much as all others together is
  missing.
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
"""Number of actions that SASRec reads per user of MovieLens-1M."""
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
    """A table, named after what its rows change."""

    OBJECTIVES = "objectives"
    NEGATIVES = "negatives"
    FEATURES = "features"
    SASREC = "sasrec"
    ENCODERS = "encoders"


def rows_of(table: Table, recipe: Recipe, log: ActionLog) -> dict[str, Ablation]:
    """Return the ablations of a table, by row name; all rows are compared with the first one."""
    if table is Table.FEATURES:
        return features(recipe, log)
    if table is Table.SASREC:
        return sasrec(recipe)
    if table is Table.ENCODERS:
        return encoders(recipe)
    return objectives(recipe) if table is Table.OBJECTIVES else negatives(recipe)


def objectives(recipe: Recipe) -> dict[str, Ablation]:
    """Return the four objectives of PinnerFormer's figure 2, and an even mix of two."""
    shares: dict[str, ObjectiveConfig] = {
        "next action": ObjectiveConfig({"next_action": 1.0}),
        "sasrec": ObjectiveConfig({"sasrec": 1.0}),
        "all action": ObjectiveConfig({"all_action": 1.0}),
        "dense all action": ObjectiveConfig({"dense_all_action": 1.0}),
        "sasrec and dense": ObjectiveConfig({"sasrec": 0.5, "dense_all_action": 0.5}),
    }
    return {name: Ablation(replace(recipe, objective=objective)) for name, objective in shares.items()}


def negatives(recipe: Recipe) -> dict[str, Ablation]:
    """Return random, in-batch and mixed negatives, equally many, each with and without the log-Q correction."""
    kinds = {"random": (1_024, 0), "in-batch": (0, 1_024), "mixed": (512, 512)}
    return {
        f"{name}, {'log-Q' if log_q == 'exact' else 'as they are'}": Ablation(
            replace(recipe, loss=LossConfig("sampled", *sizes, log_q=log_q, scale_initial=recipe.loss.scale_initial))
        )
        for name, sizes in kinds.items()
        for log_q in ("none", "exact")
    }


def features(recipe: Recipe, log: ActionLog) -> dict[str, Ablation]:
    """Return all inputs, then each input of the log left out."""
    recipe = replace(recipe, encoder=replace(recipe.encoder, time_bias=False))
    varies = {"action": len(log.action_names) > 1, "surface": len(log.surface_names) > 1}
    varies["duration_ms"] = bool(log.actions["duration_ms"].any())
    left_out = {f"without {name}": each for name, each in LEFT_OUT.items() if varies.get(each[0], True)}
    return {name: Ablation(recipe, masked=masked) for name, masked in {"all features": (), **left_out}.items()}


def encoders(recipe: Recipe) -> dict[str, Ablation]:
    """Return PinnerFormer as published and the streaming encoder, with the same size, data, objective and loss."""
    return {"window encoder": Ablation(replace(recipe, encoder=window(recipe))), "streaming encoder": Ablation(recipe)}


def window(recipe: Recipe) -> EncoderConfig:
    """Return the window encoder of the recipe's size; every layer attends to a whole chunk."""
    length, layers = recipe.data.chunk, len(recipe.encoder.windows)
    return replace(recipe.encoder, kind="window", windows=(length,) * layers, sequence_length=length, time_bias=False)


def sasrec(recipe: Recipe) -> dict[str, Ablation]:
    """Return the steps from SASRec to the streaming encoder, one change at a time; all positions have equal weight."""
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
    items_only = ("action", "surface", "duration_ms", "time_ms", "gap_ms")
    return {
        "SASRec, binary cross-entropy": Ablation(sampled, items_only, last=length, binary=True),
        "sampled softmax with log-Q": Ablation(sampled, items_only, last=length),
        "softmax over the catalogue": Ablation(catalogue, items_only, last=length),
        "whole histories in chunks": Ablation(catalogue, items_only),
        "items begun from co-occurrence": Ablation(pinnerformer, items_only),
        "all features (window encoder)": Ablation(pinnerformer),
        "streaming encoder": Ablation(streaming),
    }
