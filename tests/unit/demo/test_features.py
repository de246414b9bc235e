"""Features in the demo: each fault in what was published is found, and what is right is not reported."""

from __future__ import annotations

import asyncio
import json
import tomllib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from infra.demo import features as demo_features
from infra.demo.features import DEFINITIONS, FeatureRecount, SampledEvents, feature_values, recount_features
from infra.demo.forever import addresses
from infra.demo.recount import Recount
from infra.demo.report import _features
from infra.harness.feature_model import values
from infra.harness.worker_process import with_values
from streams.config.settings import Settings
from streams.features_kernel import NoCompiler
from streams.wire.features import FeatureBatch, encode_features

AS_OF_MS = 1_700_000_000_000
USERS = [b"ann", b"ben"]
LAST_OFFSETS = np.array([2, 0])
TABLES = tomllib.loads(DEFINITIONS.read_text())["feature"]
ITEMS = {"Alien (1979)": {"category": "1970s"}, "Heat (1995)": {"category": "1990s"}}


def sent() -> list[Any]:
    """Return the records of the input topic: three of ann, of which one comes twice, and one of ben."""
    events = [
        ("ann", "Heat (1995)", 30),
        ("ann", "Alien (1979)", 20),
        ("ann", "Heat (1995)", 10),
        ("ben", "Heat (1995)", 5),
    ]
    records = [
        SimpleNamespace(
            key=user.encode(),
            value=json.dumps(
                {
                    "user_id": user,
                    "item_id": item,
                    "action": "rated_4",
                    "timestamp_ms": AS_OF_MS - 60_000 * minutes,
                    "event_id": f"{user}-{minutes}",
                    "value": 4.0,
                }
            ).encode(),
        )
        for user, item, minutes in events
    ]
    return [*records, records[0]]


def sample() -> SampledEvents:
    """Return the events of both users."""
    found = SampledEvents.of(USERS)
    found.take(sent())
    return found


def published(user: bytes, offset: int, **changed: Any) -> Any:
    """Return a record with the values of the model, some of them changed."""
    events = list(sample().events[user].values())
    right = json.loads(json.dumps(values(TABLES, events, AS_OF_MS, ITEMS)))
    number = np.array([AS_OF_MS])
    batch = FeatureBatch(
        [user], [json.dumps({**right, **changed}).encode()], number - 1, np.array([offset]), number, number + 1,
        ["every_n"], [{}], [()], "v", AS_OF_MS,
    )  # fmt: skip
    key, value, headers = next(encode_features(batch))
    return SimpleNamespace(key=key, value=value, headers=headers)


def recounted(records: Sequence[Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureRecount:
    """Return the result for these records on the topic of features."""

    async def read(*_: Any) -> AsyncIterator[tuple[int, Sequence[Any]]]:
        yield 0, records

    monkeypatch.setattr(demo_features, "read_topic", read)
    lines = [f"{item},{known['category']}" for item, known in ITEMS.items()]
    (folder / "items.csv").write_text("\n".join(["item_id,category", *lines]) + "\n")
    settings = with_values(
        Settings(),
        {"features.definitions_file": DEFINITIONS, "features.attributes_file": folder / "items.csv"},
    )
    found = asyncio.run(recount_features(settings, USERS, LAST_OFFSETS, sample()))
    assert found is not None
    return found


def test_right_features_are_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last record of each user counts; an earlier one may be anything."""
    records = [published(b"ann", 1, actions_1d=7), published(b"ann", 2), published(b"ben", 0)]
    found = recounted(records, tmp_path, monkeypatch)
    assert (found.published, found.users, found.wrong) == (3, 2, {})
    assert found.example[1]["latest"][0] == "Heat (1995)"


@pytest.mark.parametrize(
    ("records", "user", "problem"),
    [
        ([published(b"ann", 2, actions_1d=4), published(b"ben", 0)], "ann", "actions_1d is 4, must be 3"),
        ([published(b"ann", 2, latest=["Heat (1995)"]), published(b"ben", 0)], "ann", "latest is"),
        (
            [published(b"ann", 1), published(b"ben", 0)],
            "ann",
            "the last record contains offset 1, the last event has 2",
        ),
        ([published(b"ann", 2)], "ben", "nothing is published"),
    ],
)
def test_a_wrong_record_is_a_fault(
    records: list[Any], user: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong value, an outdated record and a missing one are named with their user, and are faults of the demo."""
    found = recounted(records, tmp_path, monkeypatch)
    assert list(found.wrong) == [user]
    assert found.wrong[user].startswith(problem)
    (fault,) = Recount(4, 0, 0, 0, 0, 0, 0, 2, 1.0, 0.0, found).faults
    assert fault.startswith(f"1 users have wrong features, such as {user}: {problem}")


def test_the_report_shows_one_user_within_the_width() -> None:
    """The second line has names and values, and ends where the page does."""
    found = FeatureRecount(1_200, 500, {}, ("ann", {"a": 1, "b": 2.25, "c": None, "d": [["x", 1.0]], "e": ["i" * 100]}))
    (_, counts), (_, example) = _features(found)
    assert counts == "1,200 published, 500 users recomputed, 0 wrong"
    assert example.startswith("of user ann: a: 1, b: 2.2, c: none, d: [x 1], e: [iii")
    assert len(example) == 100
    assert _features(None) == [("features", "none, because there is no C++ compiler")]


def test_without_a_compiler_the_demo_has_no_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker would not start with definitions, and the rest of the demo needs no compiler."""

    def fail() -> None:
        raise NoCompiler("features need a C++ compiler", "", "")

    monkeypatch.setattr(demo_features, "load_functions", fail)
    assert feature_values(tmp_path) == {}
    assert Recount(4, 0, 0, 0, 0, 0, 0, 2, 1.0, 0.0, None).faults == []


def test_a_demo_that_goes_on_shows_how_to_read_features() -> None:
    """There is a command for their topic where the worker computes them, and none elsewhere."""
    with_features = with_values(Settings(), {"features.definitions_file": DEFINITIONS, "topics.features": "mine"})
    (line,) = [line for line in addresses(with_features) if line.startswith("features")]
    assert "STREAMFORMER_TOPICS_FEATURES=mine " in line
    assert line.endswith(" --features")
    assert not any("features" in line for line in addresses(Settings()))
