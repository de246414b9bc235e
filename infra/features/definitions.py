"""Definitions and item attributes of a command, from the files that its options name."""

from __future__ import annotations

from pathlib import Path

from infra.errors import detail
from streams.core.features.attributes import Attributes
from streams.core.features.definitions import DefinitionsError, FeatureSet, parse_features
from streams.features_attributes import read_attributes


def load_definitions(definitions: Path, attributes: Path | None) -> tuple[FeatureSet, Attributes]:
    """Read both files; raise `DefinitionsError` or `AttributesError` with every problem of the one that is wrong."""
    known = read_attributes(attributes) if attributes else Attributes.of({})
    try:
        text = definitions.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DefinitionsError([f"{definitions} cannot be read ({detail(error)})"]) from error
    return parse_features(text, known.names if attributes else None, known.version), known
