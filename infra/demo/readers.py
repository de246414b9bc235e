"""Three readers and a list: each one's Recall@10 over the replayed actions, overall and by user known or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from encoder.actions.columns import item_key
from encoder.arrays import Bool
from encoder.release import Release
from infra.demo.recall import Acts, Publications, SeenItems, held, hits, last_midnight_ms, popularity_hits
from infra.demo.split import Parts, distinct_items

GROUPS = {"all": "all actions", "known": "of users known at the start", "unknown": "of users unknown then"}
"""Groups of actions; a user is known with an action before the replay."""
AT_NO_TIME = 1 << 41
"""After every event time."""


@dataclass(frozen=True, slots=True)
class Recalls:
    """What each reader would have shown."""

    actions: Mapping[str, int]
    """By group."""
    recall: Mapping[str, Mapping[str, float]]
    """Reader -> group -> Recall@10; NaN for a group without actions."""


def compare(parts: Parts, release: Release, publications: Publications, published_before: int) -> Recalls:
    """Recall@10 of *fresh*, *daily*, *once* and *popular*.

    `publications` holds, in order, what was published; the first `published_before` of them before the replay began.
    """
    _, vectors = release.item_vectors()
    everything = _acts(parts, release)
    newer = Acts(*(column[parts.cut :] for column in (everything.user, everything.item, everything.time_ms)))
    seen = SeenItems(everything)
    early = Publications(
        publications.user[:published_before],
        publications.event_time_ms[:published_before],
        publications.vectors[:published_before],
    )
    chosen = {
        "fresh": held(publications, newer.user, newer.time_ms),
        "daily": held(publications, newer.user, last_midnight_ms(newer.time_ms)),
        "once": held(early, newer.user, np.full(len(newer), AT_NO_TIME)),
    }
    hit = {name: hits(newer, rows, publications.vectors, vectors, seen) for name, rows in chosen.items()}
    hit["popular"] = popularity_hits(newer, everything, len(vectors), seen)
    is_known = np.isin(newer.user, everything.user[: parts.cut])
    return _summary(hit, {"all": np.ones(len(newer), np.bool_), "known": is_known, "unknown": ~is_known})


def _acts(parts: Parts, release: Release) -> Acts:
    """Every action of the log, items as rows of the release's item vectors, which have no row for the unknown item."""
    item_ids, item_index = distinct_items(parts.log)
    keys = np.array([item_key(item) for item in item_ids], np.uint64)
    rows = release.vocabularies.item_rows(keys) - 1
    return Acts(parts.log.user_index, rows[item_index], parts.log.timestamp_ms)


def _summary(hit: Mapping[str, Bool], groups: Mapping[str, Bool]) -> Recalls:
    def mean(values: Bool) -> float:
        return float(values.mean()) if len(values) else float("nan")

    recall = {name: {group: mean(values[rows]) for group, rows in groups.items()} for name, values in hit.items()}
    return Recalls({group: int(rows.sum()) for group, rows in groups.items()}, recall)
