"""Features in the demo: definitions and item attributes for the worker, and the proof that what it publishes is right.

Values are recomputed from the input topic by the model of features, which keeps every event and shares no code with the
worker. That is slow, so it is done for a sample of users; that the last record contains the last event, for all.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from encoder.arrays import I64
from infra.chaos.checks.feature_values import difference
from infra.demo.split import Split, distinct_items
from infra.harness.feature_files import FeatureRules, feature_rules
from infra.harness.feature_model import Event
from infra.harness.whole_topic import read_topic
from streams.config.settings import Settings
from streams.features_kernel import NoCompiler, load_functions
from streams.wire.features import UserFeatures, decode_feature_metadata, decode_features

DEFINITIONS = Path(__file__).with_name("features.toml")
SAMPLE_USERS = 500
YEAR = re.compile(r"\((\d{3})\d\)$")
NUMBER = re.compile(r"(\d+)$")
ITEMS_PER_CATEGORY = 50


@dataclass(frozen=True, slots=True)
class FeatureRecount:
    """Result of the comparison."""

    published: int
    """Records on the topic."""
    users: int
    """Users whose values were recomputed."""
    wrong: Mapping[str, str]
    """What is wrong, by user."""
    example: tuple[str, Mapping[str, Any]]
    """A user and its last values."""


def feature_values(folder: Path) -> dict[str, Any]:
    """Return the settings that turn features on, and compile what they need; none if there is no compiler.

    `write_attributes` must write the file of the attributes before a worker starts.
    """
    try:
        load_functions()
    except NoCompiler:
        return {}
    return {"features.definitions_file": DEFINITIONS, "features.attributes_file": folder / "items.csv"}


def write_attributes(split: Split, path: Path) -> None:
    """Write the category of each item of the log."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["item_id", "category"])
        rows.writerows((item, category(item)) for item in distinct_items(split.log)[0])


def category(item: str) -> str:
    """Return the category of an item: the decade of a film, or a part of numbered items; empty if it has none.

    >>> category("Toy Story (1995)"), category("item-170"), category("lamp")
    ('1990s', 'part-3', '')
    """
    if found := YEAR.search(item):
        return f"{found[1]}0s"
    number = NUMBER.search(item)
    return f"part-{int(number[1]) // ITEMS_PER_CATEGORY}" if number else ""


@dataclass(frozen=True, slots=True)
class SampledEvents:
    """The events of a sample of users, as JSON has them, in the order of their arrival."""

    users: frozenset[bytes]
    events: dict[bytes, dict[str, Event]] = field(default_factory=dict)
    """Events of each user by event id: a repeated one is left out."""

    @classmethod
    def of(cls, user_keys: Sequence[bytes]) -> SampledEvents:
        """Choose at most `SAMPLE_USERS` users, evenly spread over all of them."""
        places = np.linspace(0, len(user_keys) - 1, min(SAMPLE_USERS, len(user_keys))).astype(np.int64)
        return cls(frozenset(user_keys[place] for place in places.tolist()))

    def take(self, records: Sequence[Any]) -> None:
        """Keep the events of the sample among records of the input topic."""
        for record in records:
            if record.key in self.users and record.value is not None:
                found, of_user = json.loads(record.value), self.events.setdefault(record.key, {})
                event = Event(
                    found["item_id"],
                    found["action"],
                    found["timestamp_ms"],
                    surface=found.get("surface", ""),
                    duration_ms=found.get("duration_ms", 0),
                    value=found.get("value"),
                    arrival=len(of_user),
                )
                of_user.setdefault(found["event_id"], event)


async def recount_features(
    settings: Settings, user_keys: Sequence[bytes], last_offsets: I64, sample: SampledEvents
) -> FeatureRecount | None:
    """Compare the last record of each user; `last_offsets` [U] are those of the users' last events, -1 for none."""
    rules = feature_rules(settings)
    if rules is None:
        return None
    last: dict[bytes, Any] = {}
    published = 0
    async for _, records in read_topic(settings, settings.topics.features):
        published += len(records)
        last |= {record.key: record for record in records}
    wrong = _outdated(user_keys, last_offsets, last)
    for user, events in sample.events.items():
        if user.decode() not in wrong and (problem := _problem(rules, list(events.values()), last[user])):
            wrong[user.decode()] = problem
    newest = max(last.values(), key=lambda record: decode_feature_metadata(record.headers).event_time_ms, default=None)
    return FeatureRecount(published, len(sample.events), wrong, _example(newest))


def _outdated(user_keys: Sequence[bytes], last_offsets: I64, last: Mapping[bytes, Any]) -> dict[str, str]:
    """Return the users whose last record is missing or does not contain their last event, and why."""
    found = {}
    for user, offset in zip(user_keys, last_offsets.tolist(), strict=True):
        if offset >= 0 and user not in last:
            found[user.decode()] = "nothing is published"
        elif offset >= 0 and (inside := decode_feature_metadata(last[user].headers).source_offset) != offset:
            found[user.decode()] = f"the last record contains offset {inside}, the last event has {offset}"
    return found


def _problem(rules: FeatureRules, events: Sequence[Event], record: Any) -> str:
    """Describe the first value that is not the model's; empty if there is none."""
    features = decode_features(record.key, record.value, record.headers)
    if not isinstance(features, UserFeatures):
        return "deleted"
    metadata = features.metadata
    if metadata.completeness:
        return f"incomplete: {metadata.completeness}"
    return difference(rules, events, metadata.as_of_ms, features.values, metadata.estimated)


def _example(record: Any) -> tuple[str, Mapping[str, Any]]:
    features = None if record is None else decode_features(record.key, record.value, record.headers)
    return (features.user, features.values) if isinstance(features, UserFeatures) else ("", {})
