"""Which features a subscriber takes for new."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streams.subscriber import FeatureChange, FreshestFeatures, Tombstone, UserFeatures
from streams.wire.features import FeatureMetadata


def features(user: str, offset: int, as_of_ms: int = 0, feature_set: str = "set1", source_id: str = "") -> UserFeatures:
    """Return features of a user at a source offset."""
    metadata = FeatureMetadata(feature_set, as_of_ms, 99, {"n": 0.5}, ("n",), 5, "every_n", offset, 9, source_id)
    return UserFeatures(user, {"n": 1, "top": [["red", 2]], "none": None}, metadata)


def accepted(*changes: FeatureChange, users_max: int = 100) -> list[bool]:
    """Return for each change whether it is new."""
    freshest = FreshestFeatures(users_max)
    return [freshest.accepts(change) for change in changes]


def test_an_older_or_equal_record_is_not_new() -> None:
    """After offset 5, 4 is stale and 5 as of the same time repeated; 6 is new. They are counted apart."""
    freshest = FreshestFeatures(100)
    news = [freshest.accepts(features("ann", offset)) for offset in (5, 4, 5, 6)]
    assert news == [True, False, False, True]
    assert (freshest.stale, freshest.repeated) == (1, 1)


def test_a_refresh_is_new_and_an_older_one_is_not() -> None:
    """Of one offset the later as-of time wins, whatever the order of arrival."""
    changes = [features("ann", 5, 10), features("ann", 5, 20), features("ann", 5, 15), features("ann", 4, 30)]
    assert accepted(*changes, features("ann", 6, 1)) == [True, True, False, False, True]


def test_another_feature_set_is_new_once() -> None:
    """A changed definition is published for the same offset, perhaps within the same millisecond."""
    changes = [features("ann", 5, 10), features("ann", 5, 10, "set2"), features("ann", 5, 10, "set2")]
    assert accepted(*changes) == [True, True, False]
    assert accepted(features("ann", 5, 10), features("ann", 4, 10, "set2")) == [True, False]


def test_a_tombstone_outdates_features() -> None:
    """After a tombstone at 7 no earlier features are new, later ones are; an old or repeated one forgets nobody."""
    changes = [Tombstone("ann", 7), features("ann", 7, 99), features("ann", 8), Tombstone("ann", 7)]
    assert accepted(*changes, Tombstone("ann", 9), Tombstone("ann", 9)) == [True, False, True, False, True, False]


def test_a_tombstone_without_an_offset_is_new() -> None:
    """It is always new, and leaves what was seen before as the limit."""
    changes = [features("ann", 5, 1), Tombstone("ann", -1), Tombstone("ann", -1), features("ann", 5, 1)]
    assert accepted(*changes, features("ann", 6)) == [True, True, True, False, True]


def test_offsets_of_another_log_are_not_compared() -> None:
    """After the source topic was created again, or its position moved back, lower offsets are new."""
    lives = [("A", 90), ("B", 3), ("B", 2), ("B/1", 1), ("B", 95), ("B/1", 2), ("", 1)]
    changes = [features("ann", offset, source_id=source) for source, offset in lives]
    assert accepted(*changes) == [True, True, False, True, False, True, False]
    assert accepted(features("ann", 9, source_id="A"), Tombstone("ann", 1, "B")) == [True, True]
    assert accepted(features("ann", 9), features("ann", 8, source_id="A")) == [True, False]
    changes = [features("ann", 9, source_id="A/1"), features("ann", 10), features("ann", 11, source_id="A")]
    assert accepted(*changes) == [True, True, False]


def test_memory_is_bounded_by_users() -> None:
    """Beyond the limit the user without a change for longest is forgotten, and only that one."""
    changes = [features(user, 5) for user in ("ann", "bob", "ann", "cem", "ann", "bob")]
    assert accepted(*changes, users_max=2) == [True, True, False, True, False, True]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5), st.one_of(st.none(), st.integers(0, 3)))))
def test_accepted_positions_only_rise(inputs: list[tuple[str, int, int | None]]) -> None:
    """Accepted offsets rise per user, as-of times within an offset; a tombstone (no time) comes after its offset."""
    freshest = FreshestFeatures(100)
    seen: dict[str, tuple[int, int]] = {}
    for user, offset, as_of_ms in inputs:
        change = Tombstone(user, offset) if as_of_ms is None else features(user, offset, as_of_ms)
        position = (offset, 100 if as_of_ms is None else as_of_ms)
        is_news = position > seen.get(user, (-1, -1))
        assert freshest.accepts(change) == is_news
        if is_news:
            seen[user] = position
