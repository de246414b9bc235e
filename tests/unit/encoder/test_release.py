"""Releases: strict loading, and a version that is a hash of the content."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from encoder.release import METADATA, WEIGHTS, Release, ReleaseError, load_release, make_release
from tests.unit.encoder.test_model import SEED, STREAMING, WINDOW, batch, random_actions, random_model, vocabularies


@pytest.fixture
def release() -> Release:
    """Return a release with random weights."""
    return make_release(random_model(STREAMING), vocabularies(), metrics={"hr10": 0.5}, training={"seed": 1})


@pytest.mark.parametrize("config", [STREAMING, WINDOW], ids=["streaming", "window"])
def test_a_saved_release_loads_to_the_same_function(tmp_path: Path, config: object) -> None:
    """Saving and loading preserves embeddings, item vectors and the version, bit for bit."""
    made = make_release(random_model(config), vocabularies(), metrics={}, training={})  # type: ignore[arg-type]
    loaded = load_release(made.save(tmp_path / "release"))
    sequences = batch([random_actions(20, np.random.default_rng(SEED))])
    assert torch.equal(loaded.model.embed(*sequences), made.model.embed(*sequences))
    assert loaded.version == made.version
    assert len(loaded.version) == 16
    keys, vectors = loaded.item_vectors()
    assert keys.dtype == np.uint64
    assert vectors.shape == (50, 16)
    assert np.array_equal(vectors, made.item_vectors()[1])


def test_the_version_follows_the_content(release: Release) -> None:
    """A changed weight or a renamed action type changes the version; different metrics do not."""
    model = random_model(STREAMING)
    with torch.no_grad():
        model.items.table()[3, 0] += 1e-3
    assert make_release(model, vocabularies(), metrics={}, training={}).version != release.version
    renamed = type(vocabularies())(vocabularies().item_keys, ("save", "open"), ("home",))
    assert make_release(random_model(STREAMING), renamed, metrics={}, training={}).version != release.version
    assert make_release(random_model(STREAMING), vocabularies(), metrics={}, training={}).version == release.version


def test_an_altered_weight_is_rejected(tmp_path: Path, release: Release) -> None:
    """A release with one flipped bit in its weights cannot be loaded."""
    folder = release.save(tmp_path)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-100] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ReleaseError, match=r"altered|not finite"):
        load_release(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 2, "format 2"),
        ("feature_version", 9, "feature_version 9"),
        ("version", "0" * 16, "altered"),
        ("actions", ["save"], "inconsistent"),
        ("extra", 1, "keys of format"),
    ],
)
def test_altered_metadata_is_rejected(tmp_path: Path, release: Release, key: str, value: object, message: str) -> None:
    """A changed key of release.json is rejected with an error that names it."""
    folder = release.save(tmp_path)
    metadata = json.loads((folder / METADATA).read_text())
    metadata[key] = value
    (folder / METADATA).write_text(json.dumps(metadata))
    with pytest.raises(ReleaseError, match=message):
        load_release(folder)


def test_missing_and_cut_files_are_rejected(tmp_path: Path, release: Release) -> None:
    """An empty folder and a truncated weights file are rejected with a `ReleaseError`."""
    with pytest.raises(ReleaseError, match="cannot be read"):
        load_release(tmp_path / "nothing")
    folder = release.save(tmp_path)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(ReleaseError, match="cannot be read"):
        load_release(folder)
