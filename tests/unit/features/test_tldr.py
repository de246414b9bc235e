"""Every user of a real log: values computed offline are those of the model and of the SQL queries.

The log of tldr-pages contributors is bursty, and a few of its users are heavy: their values over many days are
estimates where a definition has a cap.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from encoder.actions.columns import ACTION_DTYPE, item_key
from infra.features.offline import Job, Summary, compute_features
from infra.features.spine import Spine
from infra.harness import feature_model
from streams.core.features.attributes import Attributes
from streams.core.features.definitions import (
    DAY_MS,
    HOUR_MS,
    MINUTE_MS,
    Feature,
    FeatureSet,
    Kind,
    parse_features,
)
from streams.core.features.distinct import FULL_RANGE, Distinct
from streams.core.features.state import FeatureState
from streams.features_kernel import load_functions
from tests.unit.features import feature_sql
from tests.unit.features.agreement import agrees
from tests.unit.features.tldr import COLUMNS, LOG, MISSING, actions, items
from tests.unit.features.twenty import TOML, WHOLE

SEED = 20_261_204
pytestmark = pytest.mark.skipif(not LOG.exists(), reason=MISSING)


@cache
def by_user() -> dict[str, list[feature_model.Event]]:
    """Return the events of each user."""
    found: dict[str, list[feature_model.Event]] = {}
    for arrival, row in enumerate(actions().to_pylist()):
        user = row.pop("user_id")
        found.setdefault(user, []).append(feature_model.Event(row.pop("item_id"), **row, arrival=arrival))
    return found


@cache
def spine() -> Spine:
    """Return, for every user, a time before its first event, and three after a random one.

    They are the time of an event itself, a boundary of hops shortly or a window later, and a random time.
    """
    rng = np.random.default_rng(SEED)
    users, times = actions()["user_id"].to_pylist(), actions()["timestamp_ms"].to_numpy()
    of_user: dict[str, list[int]] = {}
    for user, at in zip(users, times.tolist(), strict=True):
        of_user.setdefault(user, []).append(at)
    rows: list[tuple[int, int]] = []
    for number, found in enumerate(of_user.values()):
        some = [int(each) for each in rng.choice(found, 3)]
        hop = int(rng.choice([5 * MINUTE_MS, HOUR_MS, DAY_MS]))
        window = int(rng.choice([0, HOUR_MS, DAY_MS, 7 * DAY_MS, 28 * DAY_MS]))
        later = int(rng.integers(1, rng.choice([HOUR_MS, DAY_MS, 40 * DAY_MS])))
        wanted = [min(found), some[0], (some[1] // hop + 1) * hop + window, some[2] + later]
        rows += [(number, at) for at in wanted]
    order = rng.permutation(len(rows))
    numbers, as_of_ms = np.array(rows, np.int64)[order].T
    return Spine(list(of_user), numbers, as_of_ms)


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Any]], Summary]:
    """The columns that were computed offline, with rankings as pairs, and the summary."""
    folder = tmp_path_factory.mktemp("tldr")
    pa.parquet.write_table(actions(), folder / "log.parquet")
    attributes = Attributes.of(items())
    features = parse_features(TOML, attributes.names)
    job = Job(features, attributes, folder / "log.parquet", COLUMNS, spine(), folder / "out.parquet", 100_000)
    summary = compute_features(job)
    table = pa.parquet.read_table(folder / "out.parquet")
    assert table["as_of_ms"].to_pylist() == spine().as_of_ms.tolist()
    columns = {name: table[name].to_pylist() for name in table.column_names}
    for each in features.features:
        if each.group:
            columns[each.name] = [[(one["name"], one["value"]) for one in row] for row in columns[each.name]]
    return columns, summary


@cache
def queried() -> dict[str, list[Any]]:
    """Return the values of the SQL queries."""
    table = actions().append_column("arrival", pa.array(np.arange(len(actions()))))
    events = table.rename_columns(["item" if name == "item_id" else name for name in table.column_names])
    rows = {"place": np.arange(len(spine())), **spine().table(0, len(spine()))}
    features = parse_features(TOML, Attributes.of(items()).names)
    return feature_sql.values(feature_sql.connect(events, items(), pa.table(rows)), features)


FEATURES = parse_features(TOML, {"platform": None, "letters": None}).features


def test_every_user_has_the_values_of_the_queries(computed: tuple[dict[str, list[Any]], Summary]) -> None:
    """All that is not marked as an estimate is exact: counts and ids are equal, numbers to 1e-9."""
    columns, summary = computed
    assert (summary.users, summary.unknown_users) == (4_028, 0)
    wanted, estimated = queried(), columns["estimated"]
    for feature in FEATURES:
        for place, names in enumerate(estimated):
            found, value = columns[feature.name][place], wanted[feature.name][place]
            assert feature.name in names or agrees(feature, found, value), (SEED, place, feature.name, found, value)


def test_every_user_has_the_values_of_the_model(computed: tuple[dict[str, list[Any]], Summary]) -> None:
    """The model, which is a list of events and nothing else, agrees too."""
    columns, _ = computed
    of_user = by_user()
    for place, (user, as_of_ms) in enumerate(zip(spine().user_of_row.tolist(), spine().as_of_ms.tolist(), strict=True)):
        wanted = feature_model.values(WHOLE, of_user[spine().users[user]], as_of_ms, items())
        for feature in FEATURES:
            found, is_estimate = columns[feature.name][place], feature.name in columns["estimated"][place]
            assert is_estimate or agrees(feature, found, wanted[feature.name]), (SEED, place, feature.name)


def theta(feature: Feature, user: str, as_of_ms: int) -> float:
    """Return the share of all ids that the state keeps of a user whose count is estimated."""
    state = FeatureState(FeatureSet((feature,)), Attributes.of({}), 1, load_functions())
    events = sorted((event.timestamp_ms, event.item) for event in by_user()[user] if event.timestamp_ms < as_of_ms)
    columns = np.zeros(len(events), ACTION_DTYPE)
    columns["timestamp_ms"] = [at for at, _ in events]
    columns["item"] = [item_key(item) for _, item in events]
    state.add(np.zeros(len(events), np.int64), columns, np.full(len(events), np.nan))
    part = state._parts.of(feature)
    assert isinstance(part, Distinct)
    return float(part.heads["theta"][0]) / FULL_RANGE


def test_estimated_counts_are_within_their_error(computed: tuple[dict[str, list[Any]], Summary]) -> None:
    """An id is kept with probability theta, and a count of n has a relative standard error of about 1 / sqrt(n theta).

    Where hardly any id is kept the error is large and not normal, so there only the sum over all rows is compared.
    """
    columns, _ = computed
    errors: list[float] = []
    kept = expected = 0.0
    for feature in FEATURES:
        for place, names in enumerate(columns["estimated"]):
            if feature.kind is Kind.DISTINCT and feature.name in names:
                user, as_of_ms = spine().users[spine().user_of_row[place]], int(spine().as_of_ms[place])
                count, share = queried()[feature.name][place], theta(feature, user, as_of_ms)
                found = columns[feature.name][place]
                kept, expected = kept + found * share, expected + count * share
                if count * share >= 5:
                    errors.append((found / count - 1) * math.sqrt(count * share))
    assert len(errors) > 80
    assert max(map(abs, errors)) < 5
    assert 0.2 < math.sqrt(sum(error * error for error in errors) / len(errors)) < 1.2
    assert abs(kept - expected) < 5 * math.sqrt(expected)


def test_estimated_rankings_never_count_too_much(computed: tuple[dict[str, list[Any]], Summary]) -> None:
    """A value that was dropped begins at 0 again, so a count may be too small; the first of a ranking rarely is."""
    columns, _ = computed
    wanted = queried()["letters_28d"]
    places = [place for place, names in enumerate(columns["estimated"]) if "letters_28d" in names]
    assert len(places) > 50
    for place in places:
        counts = {name: int(total) for name, total in wanted[place]}
        assert all(0 < number <= counts[name] for name, number in columns["letters_28d"][place]), (SEED, place)
    first = [columns["letters_28d"][place][0][1] == int(wanted[place][0][1]) for place in places if wanted[place]]
    assert np.mean(first) > 0.9
