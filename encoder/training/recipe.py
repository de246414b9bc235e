"""A recipe: everything that decides what a training makes, read from one TOML file and checked whole."""

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
    """Where the actions are."""

    path: str = ""
    """A `.parquet`, `.csv` or `.csv.gz` file, or a folder of Parquet files, in a recipe's file seen from its folder; a
    command may name another."""
    columns: LogColumns = field(default_factory=LogColumns)
    rows_in_memory_max: int = 30_000_000
    """Actions held at once, about 300 bytes each. A Parquet log of more is trained on in shards on disk, which then
    decide the result: at most half as many actions in each, for the users who validate are held beside it."""


@dataclass(frozen=True, slots=True)
class ItemConfig:
    """Where item vectors come from."""

    source: Literal["trained", "file", "text"] = "trained"
    initial: Literal["random", "cooccurrence"] = "random"
    """How trained vectors begin: "cooccurrence" factorises what is acted on together, worth several epochs."""
    path: str = ""
    """Vectors (see `encoder.items.read_vectors`), or a CSV of texts with the columns below; like `log.path`."""
    id_column: str = "item_id"
    text_columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which actions are read and predicted, and how histories become batches."""

    positives: tuple[str, ...] = ()
    """Action types that are predicted; none named means all."""
    items_min: int = 5
    """Items that occur less often share the unknown row."""
    chunk: int = 200
    """Histories are cut into pieces of this many actions, at another random phase in each epoch."""
    batch_tokens: int = 6_400
    """Padded tokens of a batch of one process."""
    hide_seen: bool = True
    """Items that a user has acted on are left out of rankings: right where a log never repeats one."""
    unknown_rate: float = 0.005
    """Share of the items that are hidden behind the unknown row, so that it is trained."""


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine to nothing over the budget."""

    lr: float = 3e-3
    weight_decay: float = 0.01
    """On matrices that are no tables."""
    warmup_steps: int = 100
    clip: float = 1.0
    dropout: float = 0.2


@dataclass(frozen=True, slots=True)
class BudgetConfig:
    """When training ends."""

    tokens_max: int = 20_000_000
    """Real (not padded) tokens read by all processes together; the learning rate is zero when they are spent."""
    validate_tokens: int = 2_000_000
    """Tokens between two validations."""
    patience: int = 5
    """Validations without a new best after which training stops; the best weights are released."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a training makes, with the same seed and machine, is a function of this and of the log."""

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
    """Of the encoder's products; "auto" takes the faster one of this machine."""

    def __post_init__(self) -> None:
        if self.encoder.kind == "window" and self.data.chunk > self.encoder.sequence_length:
            raise ValueError("data.chunk must be at most encoder.sequence_length for a window encoder")
        if self.data.chunk < 1 or self.data.batch_tokens < self.data.chunk:
            raise ValueError("data.batch_tokens must hold at least one chunk")
        if self.log.rows_in_memory_max < 2:
            raise ValueError("log.rows_in_memory_max must be at least 2")
        if not 0 <= self.optimizer.dropout < 1 or not 0 <= self.data.unknown_rate < 1:
            raise ValueError("optimizer.dropout and data.unknown_rate must lie in [0, 1)")


def read_recipe(path: Path) -> Recipe:
    """The recipe of a TOML file; raises `RecipeError`."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"recipe cannot be read: {path} ({error})") from error
    try:
        recipe = parse_recipe(values)
    except RecipeError as error:
        raise RecipeError(f"{error}; mend {path}") from None
    parts = {name: part for name in ("log", "items") if (part := getattr(recipe, name)).path}
    return replace(recipe, **{name: replace(part, path=str(path.parent / part.path)) for name, part in parts.items()})


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe of nested tables; raises `RecipeError` with every unknown key and every wrong value."""
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
