"""Recall@10 of three readers and a popularity list over the replayed actions: overall, for known and unknown users."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from encoder.actions.columns import item_key
from encoder.arrays import Bool
from encoder.release import Release
from infra.demo.recall import Acts, Publications, SeenItems, held, hits, last_midnight_ms, popularity_hits
from infra.demo.split import Split, distinct_items

GROUPS = {"all": "all actions", "known": "of users known at the start", "unknown": "of users unknown then"}
"""Groups of actions; a user with an action before the replay is known."""
AFTER_ALL_MS = 1 << 41
"""A time after every event."""


@dataclass(frozen=True, slots=True)
class Recalls:
    """Recall@10 of each reader and each group of actions."""

    actions: Mapping[str, int]
    """Number of actions by group."""
    recall: Mapping[str, Mapping[str, float]]
    """Reader -> group -> Recall@10; NaN for a group without actions."""


def compare(split: Split, release: Release, publications: Publications, published_before: int) -> Recalls:
    """Return Recall@10 of *fresh*, *daily*, *once* and *popular*.

    `publications` are in the order of publishing; the first `published_before` precede the replay.
    """
    _, vectors = release.item_vectors()
    everything = _acts(split, release)
    newer = Acts(*(column[split.cut :] for column in (everything.user, everything.item, everything.time_ms)))
    seen = SeenItems(everything)
    early = Publications(
        publications.user[:published_before],
        publications.event_time_ms[:published_before],
        publications.vectors[:published_before],
    )
    chosen = {
        "fresh": held(publications, newer.user, newer.time_ms),
        "daily": held(publications, newer.user, last_midnight_ms(newer.time_ms)),
        "once": held(early, newer.user, np.full(len(newer), AFTER_ALL_MS)),
    }
    hit = {name: hits(newer, rows, publications.vectors, vectors, seen) for name, rows in chosen.items()}
    hit["popular"] = popularity_hits(newer, everything, len(vectors), seen)
    is_known = np.isin(newer.user, everything.user[: split.cut])
    return _summary(hit, {"all": np.ones(len(newer), np.bool_), "known": is_known, "unknown": ~is_known})


def _acts(split: Split, release: Release) -> Acts:
    """Return every action of the log; items are rows of the release's item vectors, which have no unknown item."""
    item_ids, item_index = distinct_items(split.log)
    keys = np.array([item_key(item) for item in item_ids], np.uint64)
    rows = release.vocabularies.item_rows(keys) - 1
    return Acts(split.log.user_index, rows[item_index], split.log.timestamp_ms)


def _summary(hit: Mapping[str, Bool], groups: Mapping[str, Bool]) -> Recalls:
    def mean(values: Bool) -> float:
        return float(values.mean()) if len(values) else float("nan")

    recall = {name: {group: mean(values[rows]) for group, rows in groups.items()} for name, values in hit.items()}
    return Recalls({group: int(rows.sum()) for group, rows in groups.items()}, recall)
