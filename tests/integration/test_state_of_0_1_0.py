"""State written by version 0.1.0, kept in tests/data/state_v1, is read by this version and taken over by its worker."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import aiokafka
import pytest
from aiokafka.structs import TopicPartition

from infra.harness.deployment import deploy
from infra.harness.events import action, send
from infra.harness.run import Run
from infra.harness.worker_process import sample
from streams.core.layout import StateLimits
from streams.storage.codec import CheckpointMark
from streams.storage.memory_store import MemoryStore
from streams.storage.reader import read_users
from streams.storage.store import PartitionStore, Record
from tests.integration.test_identity import applied, started, state, stopped

DATA = Path(__file__).parents[1] / "data" / "state_v1"
LIMITS = StateLimits(sequence_length=32, chunk_length=8)
ACTIONS = {"ann": 40, "bob": 20, "cem": 5, "dan": 0, "käthe": 1}
"""Actions of each user; dan was forgotten after ten."""


@dataclass(frozen=True, slots=True)
class Logs:
    """Logs of one partition, as 0.1.0 left them."""

    source: list[tuple[bytes | None, bytes | None]]
    changelog: list[tuple[int, Record]]
    """Visible records with their offsets; each transaction is followed by one marker."""
    end: int


@pytest.fixture(scope="module")
def logs() -> Logs:
    """Return the kept logs."""
    kept = json.loads(gzip.decompress((DATA / "logs.json.gz").read_bytes()))
    changelog = [(offset, (_bytes(key) or b"", _bytes(value))) for offset, key, value in kept["changelog"]]
    return Logs([(_bytes(key), _bytes(value)) for key, value in kept["source"]], changelog, kept["end"])


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)


def counts(store: MemoryStore | PartitionStore) -> dict[str, int]:
    """Return how many actions each user in a store has applied, of the users whose records are whole."""
    users = [user for user, _ in store.heads()]
    read = read_users(store, users, LIMITS)
    assert not read.corrupt
    return dict(zip((user.decode() for user in users), read.stored.headers["count"].tolist(), strict=True))


def test_its_changelog_is_read(logs: Logs) -> None:
    """Every user and the mark are read from the changelog records of 0.1.0."""
    store = MemoryStore()
    store.write([record for _, record in logs.changelog], logs.changelog[-1][0])
    assert counts(store) == ACTIONS
    assert store.mark() == CheckpointMark(len(logs.source), store.mark().output_offset)  # type: ignore[union-attr]


def test_its_local_database_is_read(logs: Logs, tmp_path: Path) -> None:
    """The RocksDB folder of 0.1.0 opens, and holds the same; it names no changelog."""
    shutil.copytree(DATA / "store", tmp_path / "store")
    store = PartitionStore.open(tmp_path / "store")
    try:
        assert (counts(store), store.log_id) == (ACTIONS, "")
        assert store.changelog_offset == logs.changelog[-1][0]
        assert {user.decode() for user, _ in store.pending()} == {"käthe"}
    finally:
        store.close()


@pytest.fixture
def run(broker: Any, topic_prefix: str, tmp_path: Path) -> Iterator[Run]:
    """Yield a run with one partition whose logs are not written yet."""
    with Run(deploy(tmp_path, broker.bootstrap_servers, topic_prefix, {"topics": {"partitions": 1}})) as run:
        yield run


async def write(run: Run, logs: Logs) -> None:
    """Write the logs with the same offsets: events, and changelog transactions that commit the group's offset last."""
    settings = run.deployment.settings
    servers = settings.kafka.bootstrap_servers
    async with aiokafka.AIOKafkaProducer(bootstrap_servers=servers) as producer:
        for key, value in logs.source:
            await producer.send_and_wait(settings.topics.actions, value, key=key, partition=0)
    tp = TopicPartition(settings.topics.actions, 0)
    async with aiokafka.AIOKafkaProducer(
        bootstrap_servers=servers, transactional_id=f"{settings.changelog_topic}-0"
    ) as producer:
        for _, group in groupby(enumerate(logs.changelog), lambda each: each[1][0] - each[0]):
            async with producer.transaction():
                for _, (offset, (key, value)) in group:
                    sent = await producer.send_and_wait(settings.changelog_topic, value, key=key, partition=0)
                    assert sent.offset == offset
                await producer.send_offsets_to_transaction({tp: len(logs.source)}, settings.app_id)


@pytest.mark.broker
@pytest.mark.slow
@pytest.mark.parametrize("disk", ["kept", "empty"])
def test_a_worker_takes_it_over_once(run: Run, logs: Logs, disk: str) -> None:
    """The worker continues every sequence, reports the take-over, and writes the identity at once; later starts do not.

    A kept local database is not rebuilt.
    """
    asyncio.run(write(run, logs))
    deployment = run.deployment
    if disk == "kept":
        shutil.copytree(DATA / "store", deployment.data_dir(0) / f"{deployment.settings.changelog_topic}-0")
    started(run)
    run.wait_until(lambda: '"source_topic_id": ""' not in state(deployment, "partitions", "--json"), 20)
    page = run.supervisor.page(0, "/metrics")[1]
    assert sample(page, "streamformer_stores_rebuilt_total") == 0
    assert (sample(page, "streamformer_restored_records_total") == 0) == (disk == "kept")
    send(deployment.settings, [action("ann", 41), action("cem", 6)])
    assert run.wait_resumed(20) < 20
    stopped(run)
    started(run)
    stopped(run)
    assert run.supervisor.log(0).count("taken over, once") == 1
    expected = {**ACTIONS, "ann": 41, "cem": 6}
    assert {user: applied(deployment, user) for user in ACTIONS} == expected
    state(deployment, "verify")
