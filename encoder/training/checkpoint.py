"""Checkpoints of a training: tensors and counters, tied to the recipe and the log that produced them.

A checkpoint is one file, written under another name and then renamed. It holds tensors and plain values only and is
loaded with `weights_only=True`, so reading one never executes code.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from encoder.data.log import LogParts
from encoder.errors import StreamformerError
from encoder.training.recipe import Recipe
from encoder.training.trainer import Trainer

NAME = "checkpoint.pt"


class CheckpointError(StreamformerError):
    """A checkpoint that does not belong to this training; the text says what to do."""


@dataclass
class TrainingState:
    """State of a run beyond its trainer: time spent, and early stopping."""

    seconds: float = 0.0
    """Training time before this process started."""
    best: float | None = None
    """Best validation metric so far."""
    stale: int = 0
    """Validations since the best one."""
    next_validation: int = 0
    """Number of tokens at which the next validation is due."""
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the best validation."""


def fingerprint(log: LogParts, recipe: Recipe) -> str:
    """Return a hash of the recipe and of the training log's content; the path of the log does not enter."""
    values = asdict(recipe)
    del values["log"]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for content in log.content():
        digest.update(content)
    return digest.hexdigest()[:16]


def save_checkpoint(folder: Path, trainer: Trainer, state: TrainingState, of: str) -> None:
    """Write the state of the training with fingerprint `of`.

    This is a collective call: every process of the group makes it, and the main process writes the file.
    """
    values = {"of": of, "processes": trainer.group.size, "trainer": trainer.state(), "standing": asdict(state)}
    if trainer.group.rank:
        return
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / (NAME + ".part")
    torch.save(on_cpu(values), beside)
    beside.replace(folder / NAME)


def on_cpu(state: Any) -> Any:
    """Copy nested dictionaries and lists with their tensors on the CPU, so that any machine can load them."""
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    if isinstance(state, list):
        return [on_cpu(value) for value in state]
    return state.cpu() if isinstance(state, Tensor) else state


def load_checkpoint(folder: Path, trainer: Trainer, of: str) -> TrainingState:
    """Restore a trainer from the checkpoint in `folder`, or return a fresh state if there is none.

    Raises `CheckpointError` if the checkpoint is unreadable or belongs to another training.
    """
    path = folder / NAME
    if not path.exists():
        return TrainingState(next_validation=trainer.recipe.budget.validate_tokens)
    try:
        values: dict[str, Any] = torch.load(path, weights_only=True)
        if values["of"] != of:
            raise CheckpointError(f"checkpoint is of another recipe or log: {path}; remove it or name another folder")
        if values["processes"] != trainer.group.size:
            raise CheckpointError(
                f"checkpoint was written by {values['processes']} processes, not {trainer.group.size}: {path}; "
                "start that many, or remove it to start again"
            )
        trainer.restore(values["trainer"])
        return TrainingState(**values["standing"])
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, UnpicklingError) as error:
        detail = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint cannot be read: {path} ({detail}); remove it to start again") from error
