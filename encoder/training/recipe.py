"""Recipes: all settings that determine the result of a training, read from one TOML file and validated as a whole."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError

from encoder.data.log import LogColumns
from encoder.data.split import SplitConfig
from encoder.errors import StreamformerError
from encoder.model import EncoderConfig
from encoder.training.negatives import LossConfig
from encoder.training.objectives import ObjectiveConfig


class RecipeError(StreamformerError):
    """A recipe that cannot be trained; the text lists every problem with its key."""


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Location of the actions."""

    path: str = ""
    """A `.parquet`, `.csv`, `.csv.gz` or `.jsonl` file, or a folder of Parquet files.

    A relative path in a recipe file is relative to the folder of that file. `--actions` overrides it.
    """
    columns: LogColumns = field(default_factory=LogColumns)
    rows_in_memory_max: int = 30_000_000
    """Maximum number of actions in memory, at about 300 bytes each.

    A larger Parquet log is trained on in shards on disk, and the result then depends on this number. A shard has at
    most half as many actions, because the validating users are kept in memory next to it.
    """


@dataclass(frozen=True, slots=True)
class ItemConfig:
    """Source of the item vectors."""

    source: Literal["trained", "file", "text"] = "trained"
    initial: Literal["random", "cooccurrence"] = "random"
    """Initial value of trained vectors; "cooccurrence" factorises co-occurrences and replaces several epochs."""
    path: str = ""
    """File of vectors (see `encoder.items.read_vectors`) or CSV of texts; a relative path is as in `log.path`."""
    id_column: str = "item_id"
    text_columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Actions to read and to predict, and how histories become batches."""

    positives: tuple[str, ...] = ()
    """Action types to predict; empty means all."""
    items_min: int = 5
    """Minimum number of occurrences of an item; rarer items share the unknown row."""
    chunk: int = 200
    """Number of actions per piece of a history; the cuts have a different random phase in each epoch."""
    batch_tokens: int = 6_400
    """Maximum number of padded tokens per batch and process."""
    hide_seen: bool = True
    """Whether rankings mask items that the user has acted on: right if users never act on an item twice."""
    unknown_rate: float = 0.005
    """Share of the input items that training replaces by the unknown row, so that the row is trained."""


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay to zero over the budget."""

    lr: float = 3e-3
    weight_decay: float = 0.01
    """Weight decay of the matrices of Linear layers."""
    warmup_steps: int = 100
    clip: float = 1.0
    dropout: float = 0.2


@dataclass(frozen=True, slots=True)
class BudgetConfig:
    """End of training."""

    tokens_max: int = 20_000_000
    """Number of real (not padded) tokens read by all processes together; the learning rate reaches zero there."""
    validate_tokens: int = 2_000_000
    """Number of tokens between two validations."""
    patience: int = 5
    """Number of validations without a new best after which training stops; the best weights are released."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All settings of a training; on one machine the release is a function of the recipe and the log."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    log: LogConfig = field(default_factory=LogConfig)
    items: ItemConfig = field(default_factory=ItemConfig)
    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    seed: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the encoder's matrix products; "auto" measures which one is faster on this machine."""

    def __post_init__(self) -> None:
        if self.encoder.kind == "window" and self.data.chunk > self.encoder.sequence_length:
            raise ValueError("data.chunk must be at most encoder.sequence_length for a window encoder")
        if self.data.chunk < 1 or self.data.batch_tokens < self.data.chunk:
            raise ValueError("data.batch_tokens must hold at least one chunk")
        if self.log.rows_in_memory_max < 2:
            raise ValueError("log.rows_in_memory_max must be at least 2")
        if not 0 <= self.optimizer.dropout < 1 or not 0 <= self.data.unknown_rate < 1:
            raise ValueError("optimizer.dropout and data.unknown_rate must be in [0, 1)")


def read_recipe(path: Path) -> Recipe:
    """Return the recipe of a TOML file. Raises `RecipeError`."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"recipe cannot be read: {path} ({error})") from error
    try:
        recipe = parse_recipe(values)
    except RecipeError as error:
        raise RecipeError(f"{error}; correct {path}") from None
    parts = {name: part for name in ("log", "items") if (part := getattr(recipe, name)).path}
    return replace(recipe, **{name: replace(part, path=str(path.parent / part.path)) for name, part in parts.items()})


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe of nested tables. Raises `RecipeError` that lists every unknown key and every wrong value."""
    problems = [f"unknown key {key}" for key in _unknown_keys(values, Recipe, "")]
    recipe = None
    try:
        recipe = TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        problems += [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()]
    if problems or recipe is None:
        raise RecipeError("recipe is wrong: " + "; ".join(problems))
    return recipe


def _unknown_keys(values: Mapping[str, Any], kind: type, prefix: str) -> Iterator[str]:
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    for key, value in values.items():
        if key not in known:
            yield prefix + key
        elif is_dataclass(hints[key]) and isinstance(value, Mapping):
            yield from _unknown_keys(value, hints[key], f"{prefix}{key}.")
