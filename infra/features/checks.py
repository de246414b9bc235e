"""Checks of definitions against a log, before anything is computed from it."""

from __future__ import annotations

from collections.abc import Iterator

from encoder.data.log import ActionLog, LogColumns
from encoder.data.shards import Shards
from infra.errors import InfraError
from streams.batch.feature_table import ESTIMATED, VALID_UNTIL
from streams.core.features.definitions import Feature, FeatureSet

NOTES_MAX = 20


class OfflineError(InfraError):
    """Features cannot be computed from this log or to this file."""


def check_names(features: FeatureSet, keys: tuple[str, ...]) -> None:
    """Raise `OfflineError` if a feature has the name of another column of the output."""
    taken = {*keys, VALID_UNTIL, ESTIMATED}
    if wrong := [each.name for each in features.features if each.name in taken]:
        raise OfflineError("features have names of other columns of the output", ", ".join(wrong), "rename them")


def check_columns(features: FeatureSet, columns: LogColumns) -> None:
    """Raise `OfflineError` if the log has no column for something that the definitions need."""
    lacking = [
        f"{each.name} needs --{name.replace('_', '-')}"
        for each in features.features
        for name in sorted(_needed(each))
        if not getattr(columns, name)
    ]
    if lacking:
        more = f" and {len(lacking) - NOTES_MAX} more" if len(lacking) > NOTES_MAX else ""
        raise OfflineError(
            "the log has no column for some features",
            ", ".join(lacking[:NOTES_MAX]) + more,
            "name the columns, or leave these features out; an empty column is accepted",
        )


def _needed(feature: Feature) -> set[str]:
    """Return the optional columns that a feature is computed from, by their names in `LogColumns`."""
    needed = {"duration": "duration_ms", "value": "value", "surface": "surface"}
    names = {needed[feature.of]} if feature.of in needed else set()
    return names | ({"surface"} if feature.filter.surfaces else set())


def notes_on(features: FeatureSet, log: ActionLog | Shards) -> list[str]:
    """Return what filters name and the log does not have: more often a typing error than an action to come."""
    notes = list(_unmatched(features, log))
    return [*notes[:NOTES_MAX], *([f"{len(notes) - NOTES_MAX} more"] if len(notes) > NOTES_MAX else [])]


def _unmatched(features: FeatureSet, log: ActionLog | Shards) -> Iterator[str]:
    for each in features.features:
        for kind, wanted, found in (
            ("action", each.filter.actions, log.action_names),
            ("surface", each.filter.surfaces, log.surface_names),
        ):
            if missing := sorted(set(wanted) - set(found)):
                yield f"{each.name}: no {kind} {', '.join(missing)} in the log"
