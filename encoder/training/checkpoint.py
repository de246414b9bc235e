"""Where a training can go on from: its tensors and counters, tied to the recipe and the log that made them.

One file, written beside and renamed. It holds tensors and plain values only and is read as such: nothing is executed.
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
from encoder.training.recipe import Recipe
from encoder.training.trainer import Trainer

NAME = "checkpoint.pt"


class CheckpointError(ValueError):
    """A checkpoint that does not belong to this training; the text says what to do."""


@dataclass
class TrainingState:
    """What training knows besides the trainer's own state."""

    seconds: float = 0.0
    """Spent before this process began."""
    best: float | None = None
    stale: int = 0
    """Validations since the best."""
    next_validation: int = 0
    """Tokens at which the next one is due."""
    best_weights: dict[str, Tensor] = field(default_factory=dict)


def fingerprint(log: LogParts, recipe: Recipe) -> str:
    """A hash of the recipe and of the log that is trained on, wherever the log lies."""
    values = asdict(recipe)
    del values["log"]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for content in log.content():
        digest.update(content)
    return digest.hexdigest()[:16]


def save_checkpoint(folder: Path, trainer: Trainer, standing: TrainingState, of: str) -> None:
    """Write the state of a training whose fingerprint is `of`; its processes call this together, the first writes."""
    state = {
        "of": of,
        "processes": trainer.group.size,
        "trainer": trainer.state(),
        "standing": asdict(standing),
    }
    if trainer.group.rank:
        return
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / (NAME + ".part")
    torch.save(on_cpu(state), beside)
    beside.replace(folder / NAME)


def on_cpu(state: Any) -> Any:
    """Nested dictionaries and lists with their tensors on the CPU, so that any machine goes on from a checkpoint."""
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    if isinstance(state, list):
        return [on_cpu(value) for value in state]
    return state.cpu() if isinstance(state, Tensor) else state


def load_checkpoint(folder: Path, trainer: Trainer, of: str) -> TrainingState:
    """Put a trainer where the checkpoint stood; a fresh `TrainingState` where there is none. Raises `CheckpointError`."""
    path = folder / NAME
    if not path.exists():
        return TrainingState(next_validation=trainer.recipe.budget.validate_tokens)
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if state["of"] != of:
            raise CheckpointError(f"checkpoint is of another recipe or log: {path}; remove it or name another folder")
        if state["processes"] != trainer.group.size:
            raise CheckpointError(
                f"checkpoint is of a training by {state['processes']} processes, not {trainer.group.size}: {path}; "
                "start as many, or remove it to start again"
            )
        trainer.restore(state["trainer"])
        return TrainingState(**state["standing"])
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, UnpicklingError) as error:
        detail = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint cannot be read: {path} ({detail}); remove it to start again") from error
