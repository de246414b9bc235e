"""The features of the settings: definitions and item attributes read and checked, the kernel loaded."""

from __future__ import annotations

from pathlib import Path

from streams.config.settings import Settings
from streams.core.features.attributes import Attributes
from streams.core.features.definitions import FeatureSet, parse_features
from streams.core.features.partition import FeatureConfig, RefreshPolicy
from streams.errors import CannotStart
from streams.features_attributes import read_attributes
from streams.features_kernel import load_functions


class DefinitionsUnreadable(CannotStart):
    """The file of the definitions cannot be read."""


def load_features(settings: Settings) -> FeatureConfig | None:
    """Return what the worker computes, None where no definitions are set.

    Raises `DefinitionsError` or `AttributesError` with every problem, and `NoCompiler`.
    """
    chosen = settings.features
    if chosen.definitions_file is None:
        return None
    feature_set, attributes = read_definitions(chosen.definitions_file, chosen.attributes_file)
    refresh = RefreshPolicy(
        enabled=chosen.refresh != "never",
        every_min_ms=chosen.refresh_every_ms,
        active_ms=chosen.refresh_active_ms if chosen.refresh == "active" else 0,
    )
    return FeatureConfig(feature_set, attributes, load_functions(), refresh)


def read_definitions(path: Path, attributes_path: Path | None = None) -> tuple[FeatureSet, Attributes]:
    """Read definitions and the item attributes that they use."""
    attributes = read_attributes(attributes_path) if attributes_path else None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DefinitionsUnreadable("the feature definitions cannot be read", str(error), f"check {path}") from error
    if attributes is None:
        return parse_features(text), Attributes.of({})
    return parse_features(text, attributes.names, attributes.version), attributes
