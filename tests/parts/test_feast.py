"""The generated file in a Feast repository: what is pushed from records of a worker is what Feast serves online."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from feast import FeatureStore
from typer.testing import CliRunner

from encoder.actions.columns import ACTION_DTYPE, item_key, name_code
from infra.commands.features import app
from infra.features.explain import read_all
from infra.harness.feature_model import Event
from streams.core.features.definitions import DAY_MS
from streams.core.features.state import FeatureState
from streams.features_attributes import read_attributes
from streams.features_kernel import load_functions
from streams.subscriber import FeatureChange, Tombstone
from streams.wire.features import FeatureBatch, decode_features, encode_features
from tests.unit.core.features.definitions import TOML

STORE = """
project: test
provider: local
registry: registry.db
online_store:
  type: sqlite
  path: online.db
entity_key_serialization_version: 3
"""
NOW_MS = 20_000 * DAY_MS
USERS = {
    "ann": [
        Event("i-1", "view", NOW_MS - 60_000, "home", 5_000, 9.5),
        Event("i-2", "buy", NOW_MS - 50_000, "home", 0, 3.25),
        Event("i-1", "buy", NOW_MS - 2 * DAY_MS),
    ],
    "björn": [Event("i-9", "view", NOW_MS - 40 * DAY_MS)],  # nothing in any window, an unknown item
    "cem": [],
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Feast repository with the generated file, applied by Feast's own command."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "feature_store.yaml").write_text(STORE)
    definitions, attributes = folder.parent / "features.toml", folder.parent / "items.csv"
    definitions.write_text(TOML)
    attributes.write_text("item_id,color\ni-1,red\ni-2,blue\n")
    command = ["feast", str(definitions), "--attributes", str(attributes), "--out", str(folder)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    feast = Path(sys.executable).with_name("feast")
    subprocess.run([feast, "-c", folder, "apply"], check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def generated(repository: Path) -> ModuleType:
    """Return the generated file as a module."""
    spec = importlib.util.spec_from_file_location("user_features", repository / "user_features.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published(repository: Path) -> list[FeatureChange]:
    """Return the features of all users as a subscriber returns them, through the records of a worker."""
    definitions, file = repository.parent / "features.toml", repository.parent / "items.csv"
    feature_set, problems = read_all(definitions, file)
    assert feature_set is not None, problems
    state = FeatureState(feature_set, read_attributes(file), len(USERS), load_functions())
    for row, events in enumerate(USERS.values()):
        actions = np.zeros(len(events), ACTION_DTYPE)
        for name, of in (("item", item_key), ("action", name_code), ("surface", name_code)):
            actions[name] = [of(getattr(event, name)) for event in events]
        actions["timestamp_ms"] = [event.timestamp_ms for event in events]
        actions["duration_ms"] = [event.duration_ms for event in events]
        numbers = [np.nan if event.value is None else event.value for event in events]
        state.add(np.full(len(events), row), actions, np.array(numbers, np.float64))
    rows = np.arange(len(USERS))
    as_of_ms = np.full(len(USERS), NOW_MS)
    records = state.records(rows, as_of_ms)
    batch = FeatureBatch(
        [user.encode() for user in USERS],
        records.values,
        as_of_ms,
        rows,
        as_of_ms,
        records.valid_until_ms,
        ["every_n"] * len(USERS),
        [{}] * len(USERS),
        records.estimated,
        feature_set.version,
        NOW_MS,
    )
    return [decode_features(*message) for message in encode_features(batch)]


def served(repository: Path, users: list[str]) -> dict[str, dict[str, Any]]:
    """Return what Feast serves online for users, by user and field."""
    store = FeatureStore(str(repository))
    fields = [f"user_features:{field.name}" for field in store.get_feature_view("user_features").schema]
    fields = [field for field in fields if not field.endswith(":user_id")]
    found = store.get_online_features(features=fields, entity_rows=[{"user_id": user} for user in users]).to_dict()
    return {user: {name: column[at] for name, column in found.items()} for at, user in enumerate(users)}


def test_feast_serves_what_was_published(repository: Path, generated: ModuleType) -> None:
    """Every value of every user comes back: numbers, nulls, lists, and rankings as names and numbers."""
    changes = published(repository)
    FeatureStore(str(repository)).push(generated.PUSH_SOURCE, generated.frame_of(changes))
    found = served(repository, list(USERS))
    for change in changes:
        assert not isinstance(change, Tombstone)
        values = found[change.user]
        assert values.pop("user_id") == change.user
        for name in ("top", "affinity"):
            numbers = values.pop(f"{name}_numbers")
            values[name] = [list(pair) for pair in zip(values[name], numbers, strict=True)]
        assert values == change.values


def test_the_last_change_counts_and_a_forgotten_user_has_no_values(repository: Path, generated: ModuleType) -> None:
    """Of several changes in one frame the last is pushed; a tombstone leaves null in every field."""
    store, changes = FeatureStore(str(repository)), published(repository)
    store.push(generated.PUSH_SOURCE, generated.frame_of(changes))
    frame = generated.frame_of([*changes, Tombstone("ann", 9)])
    assert len(frame) == len(USERS)
    store.push(generated.PUSH_SOURCE, frame)
    found = served(repository, ["ann", "björn"])
    assert {value for name, value in found["ann"].items() if name != "user_id"} == {None}
    assert found["björn"]["last"] is not None


def test_features_of_another_set_are_not_pushed(repository: Path, generated: ModuleType) -> None:
    """After the definitions have changed, the file must be generated again: its columns would be those of before."""
    changes = published(repository)
    generated.FEATURE_SET, before = "another", generated.FEATURE_SET
    try:
        with pytest.raises(ValueError, match="generate this file again"):
            generated.frame_of(changes)
    finally:
        generated.FEATURE_SET = before
