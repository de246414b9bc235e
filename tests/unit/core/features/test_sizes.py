"""What a definition is said to cost, and what it means in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from infra.harness.feature_model import Event
from streams.core.features.definitions import DAY_MS, HOUR_MS, Feature, FeatureSet, parse_features
from streams.core.features.schema import exactness, meaning
from streams.core.features.sizes import size_of
from streams.core.features.state import Attributes, FeatureState
from streams.features_kernel import load_functions
from tests.unit.core.features.definitions import TOML
from tests.unit.core.features.histories import add_events

ATTRIBUTES = Attributes.of({f"i{number}": {"color": f"color-{number % 100}"} for number in range(1_000)})
RENAMED = TOML.replace('["red", "blue"]', '["color-1", "color-2", "color-3", "color-4"]')
FEATURES = parse_features(RENAMED, ATTRIBUTES.names)
NOW_MS = 20_000 * DAY_MS


def stored(feature_set: FeatureSet, events: list[Event], *, is_incomplete: bool = False) -> int:
    """Return the bytes of a user with these events."""
    state = FeatureState(feature_set, ATTRIBUTES, 1, load_functions())
    add_events(state, [(0, event) for event in events])
    if is_incomplete:
        names = [each.name for each in feature_set.features]
        state.set_complete_from(np.zeros(1, np.int64), names, np.array([NOW_MS + 1]))
    return len(state.pack(np.zeros(1, np.int64))[0])


def every_tile() -> list[Event]:
    """Return events in every 5 minutes of 4 days and in every day of 60, with long numbers and many ids."""
    times = [NOW_MS - at for at in (*range(0, 4 * DAY_MS, 300_000), *range(0, 60 * DAY_MS, DAY_MS))]
    return [
        Event(f"i{n * 7 % 100}", action, at, surface, 2**32 - 1 - n, n + 1 / 3)
        for n, at in enumerate(times * 2)
        for action in ("view", "buy")
        for surface in ("home", f"s{n % 90}")
    ]


def typical_user() -> list[Event]:
    """Return the events of the user that is called typical."""
    rng = np.random.default_rng(3)
    return [
        Event(
            f"i{rng.integers(8) + 100 * rng.integers(9)}",
            str(rng.choice(["view", "buy"])),
            NOW_MS - day * 4 * DAY_MS - n * 10 * 60_000,
            str(rng.choice(["home", "search"])),
            int(rng.integers(200_000)),
            float(rng.integers(1, 9_999)) / 100,
        )
        for day in range(20)
        for n in range(12)
    ]


@pytest.mark.parametrize("feature", [*FEATURES.features, None], ids=lambda each: each.name if each else "all")
def test_no_user_takes_more_than_stated(feature: Feature | None) -> None:
    """A user who acts in every tile takes at most the bytes that are stated, and that bound is not far away."""
    feature_set = FEATURES if feature is None else FeatureSet((feature,))
    most = size_of(feature_set).most
    assert stored(feature_set, every_tile(), is_incomplete=True) <= most
    assert size_of(feature_set).typical <= most
    # An event in every tile takes too many for each lane of a ranking, for a filter that lets few through, and for a
    # count of two billion.
    if feature is not None and feature.name not in ("top", "price", "views"):
        assert stored(feature_set, every_tile()) >= most / 4


@pytest.mark.parametrize("feature", [*FEATURES.features, None], ids=lambda each: each.name if each else "all")
def test_a_typical_user_takes_about_what_is_stated(feature: Feature | None) -> None:
    """The figure called typical is right within a factor of two, up or down, or within 10 bytes."""
    feature_set = FEATURES if feature is None else FeatureSet((feature,))
    typical, found = size_of(feature_set).typical, stored(feature_set, typical_user())
    assert found / 2 - 10 <= typical <= found * 2 + 10, found


def test_features_of_one_hop_share_their_tiles() -> None:
    """The second feature of a hop over the same events adds only its own numbers, and a copy adds none."""

    def sized(*tables: dict[str, Any]) -> int:
        lines = [
            "\n".join(["[[feature]]", f'name = "f{at}"', *(f"{key} = {value!r}" for key, value in table.items())])
            for at, table in enumerate(tables)
        ]
        return size_of(parse_features("\n".join(lines))).typical

    count, total = {"kind": "count", "window": "28d"}, {"kind": "sum", "of": "value", "window": "28d"}
    assert sized(count, count) == sized(count)
    assert sized(count, {**count, "window": "7d"}) == sized(count)
    assert sized(count, total) < sized(count) + sized(total)
    gap = {"kind": "session_depth", "gap": "30m"}
    assert sized(gap, {**gap, "kind": "session_length"}) == sized(gap)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("views", 'Number of events with action "view" in the last 1h, from a boundary of 5m in UTC.'),
        ("watched", "Sum of the durations of events in the last 7d, from a boundary of 1d in UTC."),
        (
            "price",
            'Mean of the values of events with color "color-1" or "color-2" or "color-3" or "color-4" in the last 28d, '
            "from a boundary of 1d in UTC.",
        ),
        ("items", "Number of different items of events in the last 7d, from a boundary of 1d in UTC."),
        ("last_home", 'Items of the last 2 events with surface "home", newest first.'),
        ("since", 'Seconds since the last of the events with action "buy".'),
        ("depth", "Number of events of the open session of events, which is over 30m after its last event."),
        (
            "affinity",
            "The 2 values of color with the greatest sums of events, each with its sum; an event counts half after 3d.",
        ),
    ],
)
def test_a_definition_in_words(name: str, text: str) -> None:
    """Each definition is one sentence with its filters and its window."""
    (feature,) = (each for each in FEATURES.features if each.name == name)
    assert meaning(feature) == text


def test_errors_are_stated_where_there_are_any() -> None:
    """A sketch has its error, which shrinks with the cap; sums have rounding; the rest is exact."""
    by_name = {each.name: exactness(each) for each in FEATURES.features}
    assert "about 12.5 %" in by_name["items"]
    assert "at most 64 values of color" in by_name["top"]
    assert "rounding" in by_name["watched"]
    exact = {name for name, text in by_name.items() if text == "Exact."}
    assert exact == {"views", "least", "longest", "last", "last_home", "since"}
    (large,) = parse_features('[[feature]]\nname="n"\nkind="distinct"\nof="item"\nwindow="1d"\ncap=1024').features
    assert "about 3.1 %" in exactness(large)


def test_the_window_of_an_hour_reaches_into_the_tile_before() -> None:
    """The rule that the text states is the one that values follow: 13 tiles of five minutes for one hour."""
    (feature,) = (each for each in FEATURES.features if each.name == "views")
    assert (feature.tiles, feature.begin_ms(NOW_MS + 1) - NOW_MS) == (13, -HOUR_MS)
