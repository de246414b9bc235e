"""Feature definitions: read whole, refused whole with the path of every key, and hashed."""

from __future__ import annotations

import pytest

from streams.core.features.definitions import (
    DAY_MS,
    HOUR_MS,
    DefinitionsError,
    Feature,
    FeatureSet,
    Kind,
    parse_features,
)
from tests.unit.core.features.definitions import TOML

ATTRIBUTES = {"category": None}


def problems(text: str) -> list[str]:
    """Return the problems of definitions that are refused."""
    with pytest.raises(DefinitionsError) as caught:
        parse_features(text, ATTRIBUTES)
    return caught.value.problems


def one(**keys: object) -> str:
    """Return the TOML of one count of a week, with these keys added or, when None, left out."""
    table = {"name": '"n"', "kind": '"count"', "window": '"7d"', **keys}
    return "[[feature]]\n" + "\n".join(f"{key} = {value}" for key, value in table.items() if value is not None)


def test_every_kind_is_read() -> None:
    """One feature of each kind is accepted, and all are returned in the order of their names."""
    found = parse_features(TOML, {"color": None}).features
    assert {each.kind for each in found} == set(Kind)
    assert [each.name for each in found] == sorted(each.name for each in found)
    by_name = {each.name: each for each in found}
    assert by_name["price"].filter.where == (("color", ("blue", "red")),)
    assert by_name["items"].cap == 64
    assert by_name["affinity"].half_life_ms == 3 * DAY_MS


@pytest.mark.parametrize(
    ("window", "hop_ms", "tiles"),
    [
        ("5m", 300_000, 2),
        ("1h", 300_000, 13),
        ("12h", 300_000, 145),
        ("13h", HOUR_MS, 14),
        ("1d", HOUR_MS, 25),
        ("4d", HOUR_MS, 97),
        ("5d", DAY_MS, 6),
        ("7d", DAY_MS, 8),
        ("90d", DAY_MS, 91),
    ],
)
def test_the_window_chooses_the_hop(window: str, hop_ms: int, tiles: int) -> None:
    """A window has between 1 and 145 tiles, of 5 minutes, an hour or a day."""
    (found,) = parse_features(one(window=f'"{window}"')).features
    assert (found.hop_ms, found.tiles) == (hop_ms, tiles)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (one(window='"3m"'), "feature[0].window: must be from 5m to 90d, not '3m'"),
        (one(window='"91d"'), "feature[0].window: must be from 5m to 90d, not '91d'"),
        (one(window='"61m"'), "feature[0].window: must be a whole number of 5m"),
        (one(window='"37h30m"'), "feature[0].window: must be a number with a unit"),
        (one(window="7"), "feature[0].window: must be a number with a unit"),
        (one(window=None), "feature[0].window: count needs it"),
        (one(gap='"30m"'), "feature[0].gap: count does not take it"),
        (one(kind='"counts"'), "feature[0].kind: must be one of count, sum"),
        (one(kind='"sum"'), "feature[0].of: sum needs it"),
        (one(kind='"sum"', of='"price"'), "feature[0].of: must be duration or value for sum, not 'price'"),
        (one(kind='"distinct"', of='"value"'), "feature[0].of: must be item or surface for distinct"),
        (one(kind='"top_k"', group='"color"', k=3), "feature[0].group: 'color' is not among the item attributes"),
        (one(kind='"top_k"', group='"category"', k=0), "feature[0].k: must be a whole number from 1 to 100, not 0"),
        (one(kind='"top_k"', group='"category"', k=50, cap=10), "feature[0].cap: must be a whole number from 50 to"),
        (one(name='"Buys"'), "feature[0].name: must be lower-case letters"),
        (one(actions="[]"), "feature[0].actions: must be a list of names, at least one"),
        (one(actions="[1]"), "feature[0].actions: must be a list of names, at least one"),
        (one(where="3"), "feature[0].where: must be a table"),
        (one() + "\n" + one(), "feature[1].name: 'n' is the name of feature[0] too"),
        ("feature = 3", "feature: write each feature below [[feature]]"),
        ("[feature]\nname = 'n'", "feature: write each feature below [[feature]]"),
        ("", "feature: there is none"),
        ("x = ", "not TOML"),
        ("[other]\n" + one(), "other: unknown"),
    ],
)
def test_each_mistake_is_named_with_its_path(text: str, problem: str) -> None:
    """What is wrong is refused with the path of the key and what would be right."""
    assert any(each.startswith(problem) for each in problems(text)), problems(text)


def test_all_mistakes_are_named_at_once() -> None:
    """Three mistakes in two features are three problems of one error."""
    assert len(problems(one(window='"1y"', gap='"30m"') + "\n" + one(name='"m"', kind='"max"'))) == 3


def test_groups_need_an_attribute_file() -> None:
    """Without item attributes a feature that groups by one is refused, and the line names the setting."""
    with pytest.raises(DefinitionsError, match=r"features\.attributes_file"):
        parse_features(one(kind='"top_k"', group='"category"', k=3))


def test_the_version_follows_meaning_and_not_order() -> None:
    """Order of tables, keys and names in a filter do not change the version; anything that a value depends on does."""
    base = parse_features(one(actions='["a", "b"]') + "\n" + one(name='"m"')).version
    assert parse_features(one(name='"m"') + "\n" + one(actions='["b", "a", "a"]')).version == base
    changed = [one(), one(actions='["a", "b"]', window='"8d"'), one(actions='["a", "b"]', name='"o"')]
    versions = {parse_features(each + "\n" + one(name='"m"')).version for each in changed} | {base}
    assert len(versions) == 4
    assert parse_features(one(), None, "1").version != parse_features(one(), None, "2").version


def test_a_feature_keeps_its_state_under_another_name() -> None:
    """The key of the state leaves out the name, and nothing else."""
    feature = Feature("a", Kind.COUNT, window_ms=DAY_MS)
    assert feature.key == Feature("b", Kind.COUNT, window_ms=DAY_MS).key
    assert feature.key != Feature("a", Kind.COUNT, window_ms=2 * DAY_MS).key


def test_events_older_than_every_window_change_nothing() -> None:
    """The longest window counts with its hop."""
    features = (Feature("a", Kind.COUNT, window_ms=7 * DAY_MS), Feature("b", Kind.COUNT, window_ms=HOUR_MS))
    assert FeatureSet(features).longest_ms == 8 * DAY_MS
