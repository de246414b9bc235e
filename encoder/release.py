"""Releases: a trained encoder with its vocabularies, and a version that is a hash of everything it computes with.

A release is a folder with two files. `weights.safetensors` holds the parameters of the encoder, `items.weight` (one
vector per item, row 0 for the unknown item) and `item_keys` (the 64-bit keys, stored as signed integers with the same
bits). `release.json` holds the format, the feature version, the configuration of the encoder, the names of action types
and surfaces, metrics, a record of the training, and the version. Loading is strict: an unknown key, a missing tensor, a
wrong shape, a value that is not finite, or content that does not hash to the version is rejected. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from encoder.arrays import F32, U64
from encoder.errors import StreamformerError
from encoder.features import FEATURE_VERSION, Tokenizer, Vocabularies
from encoder.items import TrainedItems
from encoder.model import AnyEncoder, EncoderConfig, build_encoder

FORMAT = 1
WEIGHTS, METADATA = "weights.safetensors", "release.json"
_KEYS = {"format", "version", "feature_version", "encoder", "actions", "surfaces", "metrics", "training"}


class ReleaseError(StreamformerError):
    """A folder that is not a valid release; the text says why and what to do."""


@dataclass(frozen=True)
class Release:
    """An encoder ready to serve, with its vocabularies and the record of its training."""

    model: AnyEncoder
    """Encoder in evaluation mode, in float32, with a plain table of item vectors."""
    vocabularies: Vocabularies
    metrics: Mapping[str, Any]
    """Metrics of the release, by name."""
    training: Mapping[str, Any]
    """Record of the training: recipe, tokens, seconds, machine and more."""

    @property
    def config(self) -> EncoderConfig:
        """Configuration of the encoder."""
        return self.model.config

    @cached_property
    def version(self) -> str:
        """Version: 16 hex digits of a SHA-256 over configuration, vocabularies and weights."""
        return _version(_identity(self), self._weights)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the vocabularies."""
        return Tokenizer(self.vocabularies)

    def item_vectors(self) -> tuple[U64, F32]:
        """Return keys [I] and vectors [I, E] of the known items; an item's score is its dot product with the user."""
        with torch.inference_mode():
            vectors = self.model.item_embeddings()[1:].float().cpu().numpy()
        return self.vocabularies.item_keys, np.ascontiguousarray(vectors, np.float32)

    def save(self, folder: Path) -> Path:
        """Write the release to `folder`, created if necessary, and return the folder; each write is atomic."""
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {
            **_identity(self),
            "version": self.version,
            "metrics": dict(self.metrics),
            "training": dict(self.training),
        }
        _replace(folder / WEIGHTS, self._weights)
        _replace(folder / METADATA, json.dumps(metadata, indent=2, sort_keys=True).encode() + b"\n")
        return folder

    @cached_property
    def _weights(self) -> bytes:
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        tensors["item_keys"] = torch.from_numpy(self.vocabularies.item_keys.view(np.int64).copy())
        return save(tensors)


def make_release(
    model: AnyEncoder,
    vocabularies: Vocabularies,
    *,
    metrics: Mapping[str, Any],
    training: Mapping[str, Any],
) -> Release:
    """Return the release of a trained model: a copy whose item vectors are computed once and stored as one table."""
    with torch.inference_mode():
        table = model.items.table().detach().float().cpu().clone()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("items.")}
    served = _empty_model(model.config, vocabularies)
    served.load_state_dict({**state, "items.weight": table})
    return Release(served.eval().requires_grad_(False), vocabularies, metrics, training)


def load_release(folder: Path) -> Release:
    """Read and verify a release. Raises `ReleaseError`."""
    metadata = _read_metadata(folder / METADATA)
    tensors = _read_weights(folder / WEIGHTS)
    try:
        keys = tensors.pop("item_keys").numpy().view(np.uint64)
        vocabularies = Vocabularies(keys, tuple(metadata["actions"]), tuple(metadata["surfaces"]))
        model = _empty_model(_read_config(metadata["encoder"]), vocabularies)
        model.load_state_dict(tensors, strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise ReleaseError(f"release is inconsistent: {folder} ({detail}); train or copy it again") from error
    release = Release(model.eval().requires_grad_(False), vocabularies, metadata["metrics"], metadata["training"])
    if release.version != metadata["version"]:
        raise ReleaseError(
            f"release was altered: {folder} has version {metadata['version']}, its content is {release.version}; "
            "copy it again"
        )
    return release


def _empty_model(config: EncoderConfig, vocabularies: Vocabularies) -> AnyEncoder:
    items = TrainedItems(len(vocabularies.item_keys), config.item_dim)
    return build_encoder(config, items, actions=len(vocabularies.actions), surfaces=len(vocabularies.surfaces))


def _identity(release: Release) -> dict[str, Any]:
    """Return the part of the metadata that determines embeddings."""
    return {
        "format": FORMAT,
        "feature_version": FEATURE_VERSION,
        "encoder": asdict(release.config),
        "actions": list(release.vocabularies.actions),
        "surfaces": list(release.vocabularies.surfaces),
    }


def _version(identity: Mapping[str, Any], weights: bytes) -> str:
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode() + b"\0" + weights).hexdigest()[:16]


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ReleaseError(f"release cannot be read: {path} ({error}); name a folder written by train") from error
    if not isinstance(metadata, dict) or set(metadata) != _KEYS:
        raise ReleaseError(f"release does not have the keys of format {FORMAT}: {path}; train or copy it again")
    for key, ours in (("format", FORMAT), ("feature_version", FEATURE_VERSION)):
        if metadata[key] != ours:
            raise ReleaseError(f"release has {key} {metadata[key]}, this code reads {ours}: {path}; train it again")
    return metadata


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ReleaseError(f"weights cannot be read: {path} ({error}); copy the release again") from error
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ReleaseError(f"weights are not finite: {', '.join(bad)} in {path}; train again")
    return tensors


def _read_config(values: Mapping[str, Any]) -> EncoderConfig:
    expected = {field.name for field in fields(EncoderConfig)}
    if set(values) != expected:
        raise ValueError(f"encoder keys differ: {sorted(set(values) ^ expected)}")
    return EncoderConfig(**{**values, "windows": tuple(cast(list[int], values["windows"]))})


def _replace(path: Path, content: bytes) -> None:
    """Write another file and rename it, so that a reader sees either the old file or the new one."""
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
