"""What feature definitions mean, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from infra.errors import detail
from streams.core.features.attributes import Attributes, AttributesError
from streams.core.features.definitions import DefinitionsError, Feature, FeatureSet, Kind, parse_features, shown
from streams.core.features.schema import exactness, meaning
from streams.core.features.sizes import Size, size_of
from streams.features_attributes import AttributeFileError, read_attributes


class _AnyName(dict[str, object]):
    """Item attributes that could not be read: every name may be one, so that only other problems are reported."""

    def __contains__(self, name: object) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class ExplainedFeature:
    """What one definition means."""

    name: str
    kind: str
    meaning: str
    window_ms: int
    hop_ms: int
    tiles: int
    begins: str
    """Rule for where the window begins, empty for a kind without one."""
    exactness: str
    standard_error: float | None
    """Relative standard error beyond the cap, while as many ids as the cap are known in the window; with fewer it is
    1/√(ids known in the window). None where the value is exact or has no stated error."""
    cap: int | None
    """Ids or values of an attribute kept per user."""
    bytes: Size
    """Bytes per user of the feature alone."""

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield titles and texts."""
        yield "is", self.meaning
        if self.begins:
            yield "window", self.begins
        yield "exact", self.exactness
        if self.cap is not None:
            yield "cap", f"{self.cap} per user"
        yield "bytes", f"{self.bytes.typical:,} typically, {self.bytes.most:,} at most"


@dataclass(frozen=True, slots=True)
class Explained:
    """What a feature set means."""

    NOTE: ClassVar[str] = (
        "Bytes are those of the stored state per user, of each feature alone. Features with the same hop share tiles,\n"
        "so the whole is not their sum. Typical is a user who acts on one day of four, about 12 times within two hours."
    )
    feature_set: str
    features: tuple[ExplainedFeature, ...]
    size: Size

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        return {
            "feature_set": self.feature_set,
            "bytes": asdict(self.size),
            "features": [asdict(each) for each in self.features],
        }


def explain(feature_set: FeatureSet) -> Explained:
    """Return what the definitions mean."""
    features = tuple(_explained(each) for each in feature_set.features)
    return Explained(feature_set.version, features, size_of(feature_set))


def read_all(definitions: Path, attributes: Path | None) -> tuple[FeatureSet | None, list[str]]:
    """Read both files; return the feature set, or None and every problem of both."""
    problems: list[str] = []
    known: Mapping[str, object] | None = None
    version = ""
    if attributes is not None:
        try:
            found: Attributes = read_attributes(attributes)
            known, version = found.names, found.version
        except AttributeFileError as error:
            known = _AnyName()
            problems += [f"{attributes}: {each}" for each in error.problems]
        except AttributesError as error:
            known = _AnyName()
            problems.append(str(error))
    try:
        feature_set = parse_features(definitions.read_text(encoding="utf-8"), known, version)
    except DefinitionsError as error:
        return None, problems + [f"{definitions}: {each}" for each in error.problems]
    except (OSError, ValueError) as error:
        return None, [*problems, f"{definitions}: cannot be read ({detail(error)})"]
    return (None if problems else feature_set), problems


def _explained(feature: Feature) -> ExplainedFeature:
    has_cap = feature.kind in (Kind.DISTINCT, Kind.TOP_K, Kind.DECAYED_AFFINITY)
    return ExplainedFeature(
        name=feature.name,
        kind=str(feature.kind),
        meaning=meaning(feature),
        window_ms=feature.window_ms,
        hop_ms=feature.hop_ms,
        tiles=feature.tiles,
        begins=_begins(feature),
        exactness=exactness(feature),
        standard_error=feature.cap**-0.5 if feature.kind is Kind.DISTINCT else None,
        cap=feature.cap if has_cap else None,
        bytes=size_of(feature),
    )


def _begins(feature: Feature) -> str:
    if not feature.window_ms:
        return ""
    window, hop = shown(feature.window_ms), shown(feature.hop_ms)
    longest = shown(feature.window_ms + feature.hop_ms)
    return (
        f"as of t it begins at t - {window}, rounded down to a boundary of {hop} in UTC: at least {window}, less than "
        f"{longest}; {feature.tiles} tiles of {hop}"
    )
