"""From bytes to bytes with real worker processes on the real broker: killed, poisoned, and asked to forget."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiokafka
import numpy as np
import pytest
import torch

from encoder.actions.columns import item_key
from encoder.features import Vocabularies
from encoder.items import TrainedItems
from encoder.model import EncoderConfig, build_encoder
from encoder.release import make_release
from infra.demo.recount import read_topic
from infra.demo.worker import WorkerProcess, free_port, with_values, worker_process
from infra.kafka.topics import ensure_topics
from streams.config.settings import Settings, load_settings
from streams.storage.codec import decode_head

pytestmark = pytest.mark.broker
PARTITIONS = 2
USERS = 40


@pytest.fixture(scope="module")
def release_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny release with random weights."""
    torch.manual_seed(7)
    config = EncoderConfig(d_model=16, heads=2, kv_heads=1, windows=(8, 8), embedding_dim=8, item_dim=8)
    keys = np.unique(np.array([item_key(f"i{i}") for i in range(50)], np.uint64))
    model = build_encoder(config, TrainedItems(len(keys), 8), actions=1, surfaces=0)
    release = make_release(model, Vocabularies(keys, ("click",), ()), metrics={}, training={})
    return release.save(tmp_path_factory.mktemp("release"))


class Application:
    """One application: its settings, its topics, its workers."""

    def __init__(self, bootstrap_servers: str, name: str, folder: Path, release_dir: Path) -> None:
        self.folder = folder
        self.values: dict[str, Any] = {
            "app_id": name,
            "kafka.bootstrap_servers": bootstrap_servers,
            "kafka.session_timeout_ms": 6_000,
            "topics.actions": f"{name}-in",
            "topics.embeddings": f"{name}-out",
            "topics.dead_letter": f"{name}-dead",
            "topics.partitions": PARTITIONS,
            "checkpoint.interval_ms": 200,
            "encoder.release_dir": release_dir,
            "encoder.cache_bytes_max": 8 << 20,
            "state.hot_users_max": 4_096,
            "data_dir": folder / "state",
            "web.port": free_port(),
            "worker.instance_id": "one",
        }
        self.settings: Settings = with_values(load_settings(), self.values)
        self.client = {"bootstrap_servers": bootstrap_servers}
        ensure_topics(self.settings)

    @contextmanager
    def worker(self, **values: Any) -> Iterator[WorkerProcess]:
        with worker_process({**self.values, **values}, self.settings, self.folder / "worker.log") as worker:
            yield worker

    def send(self, records: list[tuple[bytes, bytes | None]]) -> None:
        async def work() -> None:
            async with aiokafka.AIOKafkaProducer(**self.client) as producer:
                for key, value in records:
                    await producer.send(self.settings.topics.actions, key=key, value=value)
                await producer.flush()

        asyncio.run(work())

    def read(self, topic: str) -> list[Any]:
        async def work() -> list[Any]:
            return [record async for _, records in read_topic(self.settings, topic) for record in records]

        return asyncio.run(work())

    def counts(self) -> dict[bytes, int]:
        """Actions ever applied, by user, as the changelog has them."""
        heads = {r.key[1:]: r.value for r in self.read(self.settings.changelog_topic) if r.key[:1] == b"u"}
        return {user: int(decode_head(user, value)[0]["count"][0]) for user, value in heads.items()}

    def embedded(self) -> dict[bytes, int]:
        """Newest source offset in the output topic, by user; -1 after a tombstone."""
        newest: dict[bytes, int] = {}
        for record in self.read(self.settings.topics.embeddings):
            newest[record.key] = -1 if record.value is None else int(dict(record.headers)["source-offset"])
        return newest

    def last_offsets(self) -> dict[bytes, int]:
        return {record.key: record.offset for record in self.read(self.settings.topics.actions)}


@pytest.fixture
def application(broker: Any, topic_prefix: str, tmp_path: Path, release_dir: Path) -> Application:
    return Application(broker.bootstrap_servers, topic_prefix, tmp_path, release_dir)


def action(user: int, number: int, **fields: Any) -> tuple[bytes, bytes]:
    event = {
        "user_id": f"u{user}",
        "item_id": f"i{number % 50}",
        "action": "click",
        "timestamp_ms": 1_700_000_000_000 + number,
        **fields,
    }
    return b"u%d" % user, json.dumps(event).encode()


def numbered(begin: int, end: int) -> list[tuple[bytes, bytes | None]]:
    return [action(number % USERS, number) for number in range(begin, end)]


def eventually(condition: Callable[[], bool], seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.3)


def test_every_action_reaches_state_and_output_once_through_kills(application: Application) -> None:
    """After two kill -9 amid traffic, with the disk kept and with it lost, every action is counted exactly once."""
    application.send(numbered(0, 3_000))
    with application.worker() as worker:
        eventually(lambda: sum(application.counts().values()) > 0)
        worker.kill()
    application.send(numbered(3_000, 6_000))
    with application.worker() as worker:
        eventually(lambda: sum(application.counts().values()) > 3_000)
        worker.kill()
    application.send(numbered(6_000, 7_000))
    with application.worker(data_dir=application.folder / "another-disk") as worker:
        eventually(lambda: application.embedded() == application.last_offsets())
        worker.stop()
    assert application.counts() == Counter(key for key, _ in numbered(0, 7_000))
    published = [
        (r.key, dict(r.headers)["source-offset"]) for r in application.read(application.settings.topics.embeddings)
    ]
    assert len(published) == len(set(published)), "an embedding was published twice"


def test_poison_becomes_dead_letters_and_stops_nothing(application: Application) -> None:
    """Unreadable records are dead-lettered with reason and origin, their bytes untouched; the rest is applied."""
    poison: list[tuple[bytes, bytes | None]] = [
        (b"u1", b"\xff\xfe not json"),
        (b"u1", b'{"user_id":"u1"}'),
        action(1, 5, timestamp_ms=1_700_000_000),
        (b"u2", action(3, 5)[1]),
    ]
    application.send([*numbered(0, 100), *poison, *numbered(100, 200)])
    with application.worker() as worker:
        eventually(lambda: application.embedded() == {b"u%d" % u: o for u, o in self_offsets(application).items()})
        worker.stop()
    letters = application.read(application.settings.topics.dead_letter)
    assert sorted(letter.value for letter in letters) == sorted(value for _, value in poison if value is not None)
    for letter in letters:
        headers = dict(letter.headers)
        assert headers["source-topic"].decode() == application.settings.topics.actions
        assert headers["error-reason"]
    assert sum(application.counts().values()) == 200


def self_offsets(application: Application) -> dict[int, int]:
    """Offset of each user's last good action."""
    good = {value for _, value in numbered(0, 200)}
    return {int(r.key[1:]): r.offset for r in application.read(application.settings.topics.actions) if r.value in good}


def test_a_forgotten_user_stays_forgotten(application: Application) -> None:
    """A tombstone empties state and output; an event from before it does not bring the user back."""
    application.send(numbered(0, 80))
    application.send([(b"u7", None)])
    late = action(7, 9)
    application.send([late, *numbered(80, 100)])
    with application.worker() as worker:
        eventually(lambda: application.embedded().get(b"u19") is not None and application.embedded().get(b"u7") == -1)
        worker.stop()
    assert application.counts()[b"u7"] == 0
    assert application.embedded()[b"u7"] == -1


def test_sigterm_checkpoints_what_was_processed(application: Application) -> None:
    """A worker told to stop leaves at once with exit code 0, and its successor has nothing to replay."""
    application.send(numbered(0, 500))
    with application.worker(**{"checkpoint.interval_ms": 25_000}) as worker:
        eventually(lambda: application.embedded() == application.last_offsets())
        assert not application.counts()
        worker.stop()
    assert application.counts() == Counter(key for key, _ in numbered(0, 500))


def test_wrong_settings_are_one_line(application: Application) -> None:
    """A worker without a release ends with one line that says what to do, and no traceback."""
    with application.worker(**{"encoder.release_dir": application.folder / "nothing"}) as worker:
        process = worker._process
        assert process.wait(60) not in (0, -signal.SIGKILL)
    text = (application.folder / "worker.log").read_text()
    assert "Traceback" not in text
    assert [line for line in text.splitlines() if line.startswith("error:")]
