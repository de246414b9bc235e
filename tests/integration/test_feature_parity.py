"""What a worker publishes is what the offline computation finds, for every user of a real log.

The log of tldr-pages contributors is sent in its order, except that some events come late and some come twice. The
events of each user are moved together, so that the last one is within the last two hours: the windows of every user
hold events, although a worker's values are as of the present. Each record has its own `as-of-ms`, for which its user is
computed offline.
"""

from __future__ import annotations

import asyncio
import csv
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from encoder.arrays import I64
from encoder.data.log import LogColumns
from infra.datasets.event_log import EventLog, event_log
from infra.datasets.replay import Acknowledged, Pace, replay
from infra.features.offline import Job, compute_features
from infra.features.spine import Spine
from infra.harness.deployment import Deployment, deploy
from infra.harness.run import Run
from infra.harness.supervisor import STOPPED
from streams.core.features.definitions import HOUR_MS, Kind
from streams.features import read_definitions
from streams.wire.features import UserFeatures, decode_features
from tests.unit.features.agreement import agrees
from tests.unit.features.tldr import LOG, MISSING, actions, items
from tests.unit.features.twenty import TOML

pytestmark = [
    pytest.mark.broker,
    pytest.mark.slow,
    pytest.mark.skipif(not LOG.exists(), reason=MISSING),
]
SEED = 20_261_201
LATE_SHARE, REPEATED_SHARE = 0.05, 0.03
LATE_MAX = 12
"""Events of the same user that come before a late or repeated one; the worker keeps the last 32."""
COLUMNS = LogColumns(surface="surface", duration_ms="duration_ms", value="value", event_id="event_id")
READ_S = 40


def arriving(now_ms: int) -> tuple[pa.Table, I64]:
    """Return the events in the order in which they are sent, and the rows among them that repeat another one."""
    rng = np.random.default_rng(SEED)
    users = actions()["user_id"].combine_chunks().dictionary_encode()
    user = users.indices.to_numpy().astype(np.int64)
    order = np.argsort(user, kind="stable")  # the events of a user are neighbours
    place = np.empty(len(user), np.int64)
    place[order] = np.arange(len(user))
    last = np.searchsorted(user[order], user, side="right") - 1  # place of the last event of the same user
    later = order[np.minimum(place + rng.integers(1, LATE_MAX, len(user)), last)]  # a later event of the same user
    chance = rng.random(len(user))
    sent_after = np.where(chance < LATE_SHARE, later + 0.5, np.arange(len(user)))
    repeated = np.flatnonzero(chance > 1 - REPEATED_SHARE)
    rows = np.concatenate([np.arange(len(user)), repeated])
    arrival = np.argsort(np.concatenate([sent_after, later[repeated] + 0.6]), kind="stable")
    times = actions()["timestamp_ms"].to_numpy()
    ends = now_ms - rng.integers(1_000, 2 * HOUR_MS, len(users.dictionary))  # [U] new time of the last event
    moved = times + (ends - times[order[last]][_first_of(user)])[user]
    table = actions().set_column(3, "timestamp_ms", pa.array(moved))
    table = table.append_column("event_id", pa.array([f"e-{row}" for row in range(len(user))]))
    return table.take(pa.array(rows[arrival])), np.flatnonzero(arrival >= len(user))


def _first_of(user: I64) -> I64:
    """Return the first row of each user."""
    return np.unique(user, return_index=True)[1]


def send(log: EventLog, run: Run) -> I64:
    """Send the log; return the offset of each row."""
    offsets = np.full(len(log), -1, np.int64)

    def note(batch: Acknowledged) -> None:
        offsets[batch.rows] = batch.base_offset + np.arange(len(batch.rows))

    asyncio.run(replay(log, run.deployment.settings, Pace(), on_acknowledged=note))
    return offsets


def users_with_late_events(log: EventLog) -> set[str]:
    """Return the users of whom an event comes after a newer one.

    What is dropped beyond a cap depends on the order of arrival, so their estimates may differ from those offline.
    """
    order = np.argsort(log.user_index, kind="stable")
    user, times = log.user_index[order], log.timestamp_ms[order]
    is_late = (np.diff(times) < 0) & (np.diff(user) == 0)
    return {log.user_keys[number].decode() for number in user[1:][is_late].tolist()}


def deployed(folder: Path, servers: str, name: str) -> Deployment:
    """Deploy a worker without a release, with the twenty definitions."""
    (folder / "features.toml").write_text(TOML)
    with (folder / "items.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item_id", "platform", "letters"])
        rows.writerows([item, known["platform"], known["letters"]] for item, known in items().items())
    files = {
        "definitions_file": str(folder / "features.toml"),
        "attributes_file": str(folder / "items.csv"),
    }
    deployment = deploy(folder, servers, name, {"features": files})
    lines = deployment.config.read_text().splitlines(keepends=True)
    deployment.config.write_text("".join(line for line in lines if not line.startswith("release_dir")))
    return deployment


def published(run: Run, wanted: dict[str, int]) -> dict[str, UserFeatures]:
    """Return the last record of each user, once it contains the event at the wanted offset."""
    found: dict[str, UserFeatures] = {}

    def is_complete() -> bool:
        for record in run.reader.read_new().features:
            decoded = decode_features(record.key, record.value, record.headers)
            assert isinstance(decoded, UserFeatures)
            found[decoded.user] = decoded
        return {user: of.metadata.source_offset for user, of in found.items()} == wanted

    run.wait_until(is_complete, READ_S)
    assert run.supervisor.stop() == {STOPPED: 1}
    assert is_complete()
    return found


def computed(table: pa.Table, found: dict[str, UserFeatures], folder: Path, run: Run) -> dict[str, list[Any]]:
    """Return the columns of the offline computation, one row per record, as of the time of the record."""
    settings = run.deployment.settings.features
    assert settings.definitions_file is not None
    features, attributes = read_definitions(settings.definitions_file, settings.attributes_file)
    # Sums that differ by rounding may change places, also across the end of a ranking, so offline it is whole.
    whole = (replace(each, k=each.cap) if each.kind is Kind.DECAYED_AFFINITY else each for each in features.features)
    features = replace(features, features=tuple(whole))
    pa.parquet.write_table(table, folder / "log.parquet")
    as_of_ms = np.array([of.metadata.as_of_ms for of in found.values()])
    spine = Spine(list(found), np.arange(len(found)), as_of_ms)
    compute_features(Job(features, attributes, folder / "log.parquet", COLUMNS, spine, folder / "out.parquet"))
    columns = pa.parquet.read_table(folder / "out.parquet").to_pydict()
    assert list(columns["user_id"]) == list(found)
    for each in features.features:
        if each.group:
            columns[each.name] = [[(one["name"], one["value"]) for one in row] for row in columns[each.name]]
    return columns


def test_every_user_has_the_values_of_the_offline_computation(broker: Any, topic_prefix: str, tmp_path: Path) -> None:
    """Counts and lists are equal, numbers to 1e-9, of 4,028 users and twenty definitions; late and repeated events.

    Only estimates of users with late events are left out.
    """
    table, repeats = arriving(time.time_ns() // 1_000_000)
    log = event_log(table)
    with Run(deployed(tmp_path, broker.bootstrap_servers, topic_prefix)) as run:
        run.supervisor.scale(1)
        offsets = send(log, run)
        applied = np.setdiff1d(np.arange(len(log)), repeats)
        wanted = {log.user_keys[log.user_index[row]].decode(): int(offsets[row]) for row in applied.tolist()}
        found = published(run, wanted)
        columns = computed(table, found, tmp_path, run)
        features = read_definitions(tmp_path / "features.toml", tmp_path / "items.csv")[0].features
    assert len(found) == 4_028
    with_late = users_with_late_events(log)
    wrong = [
        (SEED, user, each.name, of.values[each.name], columns[each.name][place], of.metadata.estimated)
        for place, (user, of) in enumerate(found.items())
        for each in features
        if not agrees(each, of.values[each.name], columns[each.name][place])
        and not (user in with_late and each.name in {*of.metadata.estimated, *columns["estimated"][place]})
    ]
    assert wrong == []
    assert all(of.metadata.completeness == {} for of in found.values())
    assert sum(bool(of.metadata.estimated) for of in found.values()) > 50
    for name in ("acts_1d", "items_28d", "last_5", "platforms_7d", "affinity"):
        assert sum(bool(of.values[name]) for of in found.values()) > 3_000, name
