"""A Feast feature view of a feature set, as a Python file for a Feast repository."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import Template

from infra.errors import InfraError
from streams.core.features.definitions import Feature, FeatureSet, Kind
from streams.core.features.schema import meaning

FILE_NAME = "user_features.py"
USER, TIME = "user_id", "event_timestamp"
NUMBERS = "_numbers"
"""What follows the name of a ranking for the field with its numbers."""
RANKED = (Kind.TOP_K, Kind.DECAYED_AFFINITY)
COUNTED = (Kind.COUNT, Kind.DISTINCT, Kind.SESSION_DEPTH)

TEMPLATE = Path(__file__).with_name("feast_view.txt")


def feast_file(feature_set: FeatureSet) -> str:
    """Return the text of the file; raise `InfraError` if two fields would have one name."""
    fields = [field for each in feature_set.features for field in _fields(each)]
    names = [USER, TIME, *(name for name, _, _ in fields)]
    if taken := sorted({name for name in names if names.count(name) > 1}):
        raise InfraError("no Feast view of these features", f"two fields would be {', '.join(taken)}", "rename them")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        version=feature_set.version,
        fields="\n".join(_field(*each) for each in fields),
        single=_names(each for each in feature_set.features if each.kind not in RANKED),
        ranked=_names(each for each in feature_set.features if each.kind in RANKED),
    )


def _field(name: str, dtype: str, text: str) -> str:
    described = json.dumps(text, ensure_ascii=False)
    return f'        Field(name="{name}", dtype={dtype}, description={described}),'


def _names(features: Iterable[Feature]) -> str:
    return "\n".join(f'    "{each.name}",' for each in features)


def _fields(feature: Feature) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and description of a feature's fields."""
    text = meaning(feature)
    if feature.kind in RANKED:
        yield feature.name, "Array(String)", text
        yield feature.name + NUMBERS, "Array(Float64)", f"Numbers of {feature.name}."
    elif feature.kind is Kind.LAST_K:
        yield feature.name, "Array(String)", text
    else:
        yield feature.name, "Int64" if feature.kind in COUNTED else "Float64", text
