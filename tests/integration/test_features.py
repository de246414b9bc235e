"""Features as a worker publishes them, compared with the model, which shares no code with them."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.harness.deployment import Deployment, deploy
from infra.harness.events import action, send
from infra.harness.feature_model import Event, values
from infra.harness.run import NotReached, Run
from infra.harness.supervisor import STOPPED
from streams.wire.features import UserFeatures, decode_features
from streams.wire.headers import Tombstone

pytestmark = [pytest.mark.broker, pytest.mark.slow]
DEFINITIONS = """
[[feature]]
name = "clicks_1h"
kind = "count"
actions = ["click"]
window = "1h"

[[feature]]
name = "price_7d"
kind = "mean"
of = "value"
window = "7d"

[[feature]]
name = "items_1d"
kind = "distinct"
of = "item"
window = "1d"

[[feature]]
name = "latest"
kind = "last_k"
k = 3

[[feature]]
name = "since"
kind = "seconds_since"

[[feature]]
name = "depth"
kind = "session_depth"
gap = "30m"

[[feature]]
name = "categories"
kind = "top_k"
group = "category"
window = "28d"
k = 2
"""
TABLES = tomllib.loads(DEFINITIONS)["feature"]
CATEGORIES = {f"item-{number}": {"category": "even" if number % 2 == 0 else "odd"} for number in range(40)}
USERS = ["ann", "ben", "cleo"]


def deployed(folder: Path, servers: str, name: str, **overrides: dict[str, Any]) -> Deployment:
    """Deploy with these definitions and attributes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "features.toml").write_text(DEFINITIONS)
    rows = [f"{item},{known['category']}" for item, known in CATEGORIES.items()]
    (folder / "items.csv").write_text("\n".join(["item_id,category", *rows]) + "\n")
    features = {
        "definitions_file": str(folder / "features.toml"),
        "attributes_file": str(folder / "items.csv"),
        **overrides.pop("features", {}),
    }
    return deploy(folder, servers, name, {"features": features, **overrides})


@pytest.fixture
def run(broker: Any, topic_prefix: str, tmp_path: Path) -> Iterator[Run]:
    """Yield a run of a deployment with features, whose workers are not started yet."""
    with Run(deployed(tmp_path, broker.bootstrap_servers, topic_prefix)) as run:
        yield run


def newest(run: Run) -> dict[str, UserFeatures | Tombstone]:
    """Return the last record of each user in the features topic."""
    found = {}
    for record in run.reader.read_all(run.deployment.settings.topics.features):
        decoded = decode_features(record.key, record.value, record.headers)
        found[decoded.user] = decoded
    return found


def expected(events: list[dict[str, Any]], as_of_ms: int, tables: list[dict[str, Any]] = TABLES) -> dict[str, Any]:
    """Return the values of the model."""
    of_user = [
        Event(
            each["item_id"],
            each["action"],
            each["timestamp_ms"],
            duration_ms=each["duration_ms"],
            value=each.get("value"),
            arrival=arrival,
        )
        for arrival, each in enumerate(events)
    ]
    return json.loads(json.dumps(values(tables, of_user, as_of_ms, CATEGORIES)))


def act(run: Run, number: int, sent: dict[str, list[dict[str, Any]]], **fields: Any) -> None:
    """Send action `number` of every user."""
    events = [action(user, number, **fields) for user in USERS]
    for user, (_, value) in zip(USERS, events, strict=True):
        sent.setdefault(user, []).append(json.loads(value or b""))
    send(run.deployment.settings, events)


def difference(run: Run, sent: dict[str, list[dict[str, Any]]], tables: list[dict[str, Any]] = TABLES) -> str:
    """Describe how the last records differ from the model."""
    found, lines = newest(run), []
    for user, events in sent.items():
        of = found.get(user)
        if isinstance(of, UserFeatures):
            must = expected(events, of.metadata.as_of_ms, tables)
            lines += [
                f"{user}.{name}: {of.values.get(name)} must be {must[name]}"
                for name in must
                if of.values.get(name) != must[name]
            ]
        else:
            lines.append(f"{user}: {of}")
    return "; ".join(lines)


def wait_agreed(run: Run, sent: dict[str, list[dict[str, Any]]]) -> None:
    """Wait until the last record of every user is what the model says."""
    try:
        run.wait_until(lambda: not difference(run, sent), 20)
    except NotReached:
        raise AssertionError(difference(run, sent)) from None


def test_a_worker_publishes_the_features_of_every_user(run: Run) -> None:
    """Values are those of the model after events in order, late ones, duplicates, a kill and a deletion."""
    sent: dict[str, list[dict[str, Any]]] = {}
    run.supervisor.scale(1)
    for number in range(5):
        act(run, number, sent, value=number / 2)
    wait_agreed(run, sent)
    run.supervisor.kill(0)
    act(run, 7, sent)
    act(run, 6, sent, action="view")  # late
    send(run.deployment.settings, [action(user, 6, action="view") for user in USERS])  # the same event ids
    wait_agreed(run, sent)
    metadata = newest(run)["ann"].metadata
    assert metadata.completeness == {}
    assert metadata.valid_until_ms > time.time() * 1_000
    send(run.deployment.settings, [(b"ann", None)])
    run.wait_until(lambda: isinstance(newest(run)["ann"], Tombstone), 20)
    sent["ann"] = []
    time.sleep(0.1)
    act(run, 1_002, sent, item_id="item-9")  # newer than the deletion
    wait_agreed(run, sent)


def test_changed_definitions_keep_what_is_unchanged(run: Run) -> None:
    """After a restart with other definitions the first event publishes all of them, complete where nothing was cut."""
    sent: dict[str, list[dict[str, Any]]] = {}
    run.supervisor.scale(1)
    for number in range(5):
        act(run, number, sent, value=number / 2)
    wait_agreed(run, sent)
    before = newest(run)["ann"]
    assert run.supervisor.stop() == {STOPPED: 1}
    file = run.deployment.settings.features.definitions_file
    assert file is not None
    file.write_text(DEFINITIONS.replace("k = 3", "k = 4"))
    run.supervisor.scale(1)
    act(run, 8, sent)
    tables = tomllib.loads(file.read_text())["feature"]
    run.wait_until(lambda: not difference(run, sent, tables), 20)
    after = newest(run)["ann"]
    assert isinstance(before, UserFeatures)
    assert isinstance(after, UserFeatures)
    assert before.metadata.feature_set != after.metadata.feature_set
    assert after.metadata.completeness == {}
    assert run.supervisor.stop() == {STOPPED: 1}


def test_a_worker_without_a_release_publishes_features_only(run: Run) -> None:
    """It needs no torch, writes no embeddings, and continues after a kill where its checkpoint ended."""
    config, sent = run.deployment.config, dict[str, list[dict[str, Any]]]()
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("release_dir")))
    run.supervisor.scale(1)
    for number in range(3):
        act(run, number, sent)
    wait_agreed(run, sent)
    process = run.supervisor.workers[0].process
    assert process is not None
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    run.supervisor.kill(0)
    act(run, 4, sent)
    wait_agreed(run, sent)
    send(run.deployment.settings, [(b"ben", None)])
    run.wait_until(lambda: isinstance(newest(run)["ben"], Tombstone), 20)
    assert run.supervisor.stop() == {STOPPED: 1}
    assert run.reader.read_all(run.deployment.settings.topics.embeddings) == []


def test_a_value_that_changes_with_time_is_published_again(broker: Any, topic_prefix: str, tmp_path: Path) -> None:
    """The session ends without an event, so its depth is published as 0; the source offset stays the same."""
    refresh = {"refresh": "always", "refresh_every_ms": 500}
    deployment = deployed(tmp_path, broker.bootstrap_servers, topic_prefix, features=refresh)
    short = DEFINITIONS.replace('gap = "30m"', 'gap = "3s"')
    (tmp_path / "features.toml").write_text(short)
    with Run(deployment) as run:
        run.supervisor.scale(1)
        send(run.deployment.settings, [action("ben", 1_000)])
        run.wait_until(lambda: "ben" in newest(run), 20)
        send(run.deployment.settings, [action("ann", 1_000, timestamp_ms=time.time_ns() // 1_000_000)])
        run.wait_until(lambda: depth_of(run, "ann") == 1, 20)
        offset = newest(run)["ann"].metadata.source_offset
        run.wait_until(lambda: depth_of(run, "ann") == 0, 20)
        again = newest(run)["ann"]
        assert isinstance(again, UserFeatures)
        assert (again.metadata.reason, again.metadata.source_offset) == ("refresh", offset)


def depth_of(run: Run, user: str) -> int | None:
    """Return the published depth of the user's session."""
    found = newest(run).get(user)
    return found.values["depth"] if isinstance(found, UserFeatures) else None
