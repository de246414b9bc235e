"""The whole path, from bytes to bytes, with real workers on a real broker that are killed and poisoned.

The facts are counted here from the topics alone, without the model and the checker that other tests use.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.harness.deployment import deploy
from infra.harness.events import Event, action, send
from infra.harness.run import Run
from infra.harness.supervisor import STOPPED
from streams.storage.codec import HEAD_PREFIX, decode_head

pytestmark = pytest.mark.broker
USERS = 40
EPOCH_MS = 1_700_000_000_000


@pytest.fixture
def run(broker: Any, topic_prefix: str, tmp_path: Path) -> Iterator[Run]:
    """Yield a run with two partitions and a checkpoint every 200 ms."""
    overrides = {"topics": {"partitions": 2}, "checkpoint": {"interval_ms": 200}}
    with Run(deploy(tmp_path, broker.bootstrap_servers, topic_prefix, overrides)) as run:
        yield run


def numbered(begin: int, end: int) -> list[Event]:
    """Return actions of the users in turn, without event ids: only the source offset identifies a repetition."""
    return [act(number % USERS, number) for number in range(begin, end)]


def act(user: int, number: int, **fields: Any) -> Event:
    """Return one action, whose event time is `number` milliseconds after `EPOCH_MS`."""
    fields = {"item_id": f"item-{number % 50}", "timestamp_ms": EPOCH_MS + number, "event_id": None, **fields}
    return action(f"u{user}", number, **fields)


def counts(run: Run) -> dict[bytes, int]:
    """Return the number of applied actions per user, from the changelog."""
    heads = {each.key: each.value for each in run.reader.read_all(run.deployment.settings.changelog_topic)}
    return {
        key[1:]: int(decode_head(key[1:], value)[0]["count"][0])
        for key, value in heads.items()
        if key and value and key[:1] == HEAD_PREFIX
    }


def published(run: Run) -> list[tuple[bytes | None, int]]:
    """Return user and source offset of every output; the offset of a tombstone is -1."""
    outputs = run.reader.read_all(run.deployment.settings.topics.embeddings)
    return [(each.key, -1 if each.value is None else int(dict(each.headers)["source-offset"])) for each in outputs]


def last_offsets(run: Run, events: list[Event]) -> dict[bytes | None, int]:
    """Return the offset of each user's last record among the events."""
    inputs = run.reader.read_all(run.deployment.settings.topics.actions)
    return {each.key: each.offset for each in inputs if (each.key, each.value) in set(events)}


def stop(run: Run) -> None:
    """Stop every worker in order."""
    assert set(run.supervisor.stop()) == {STOPPED}


def test_every_action_reaches_state_and_output_once_through_kills(run: Run) -> None:
    """After two SIGKILLs, with the disk kept and with the disk lost, every action is counted exactly once."""
    settings, supervisor = run.deployment.settings, run.supervisor
    send(settings, numbered(0, 3_000))
    supervisor.start(0)
    run.wait_until(lambda: sum(counts(run).values()) > 0)
    supervisor.hold(0)
    send(settings, numbered(3_000, 6_000))
    supervisor.start(0)
    run.wait_until(lambda: sum(counts(run).values()) > 3_000)
    supervisor.hold(0)
    send(settings, numbered(6_000, 7_000))
    shutil.rmtree(run.deployment.data_dir(0))
    supervisor.start(0)
    run.wait_until(lambda: dict(published(run)) == last_offsets(run, numbered(0, 7_000)))
    stop(run)
    assert counts(run) == Counter(key for key, _ in numbered(0, 7_000))
    assert len(published(run)) == len(set(published(run))), "an embedding was published twice"


def test_poison_becomes_dead_letters_and_stops_nothing(run: Run) -> None:
    """Unreadable records are dead-lettered with reason and origin, their bytes unchanged; the rest is applied."""
    settings = run.deployment.settings
    poison: list[Event] = [
        (b"u1", b"\xff\xfe not json"),
        (b"u1", b'{"user_id":"u1"}'),
        act(1, 5, timestamp_ms=1_700_000_000),
        (b"u2", act(3, 5)[1]),
    ]
    send(settings, [*numbered(0, 100), *poison, *numbered(100, 200)])
    run.supervisor.scale(1)
    run.wait_until(lambda: dict(published(run)) == last_offsets(run, numbered(0, 200)))
    stop(run)
    letters = run.reader.read_all(settings.topics.dead_letter)
    assert sorted(letter.value or b"" for letter in letters) == sorted(value or b"" for _, value in poison)
    for letter in letters:
        headers = dict(letter.headers)
        assert headers["source-topic"].decode() == settings.topics.actions
        assert headers["error-reason"]
    assert sum(counts(run).values()) == 200


def test_a_forgotten_user_stays_forgotten(run: Run) -> None:
    """A tombstone empties state and output; an event from before it does not bring the user back."""
    send(run.deployment.settings, [*numbered(0, 80), (b"u7", None), act(7, 9), *numbered(80, 100)])
    run.supervisor.scale(1)
    run.wait_until(lambda: b"u19" in dict(published(run)) and dict(published(run)).get(b"u7") == -1)
    stop(run)
    assert counts(run)[b"u7"] == 0
    assert dict(published(run))[b"u7"] == -1


def test_sigterm_checkpoints_what_was_processed(broker: Any, topic_prefix: str, tmp_path: Path) -> None:
    """SIGTERM writes a checkpoint of every processed action, and the worker ends with exit code 0."""
    checkpoint, worker = {"interval_ms": 25_000}, {"watchdog_timeout_ms": 60_000}
    overrides = {"topics": {"partitions": 2}, "checkpoint": checkpoint, "worker": worker}
    with Run(deploy(tmp_path, broker.bootstrap_servers, topic_prefix, overrides)) as run:
        send(run.deployment.settings, numbered(0, 500))
        run.supervisor.scale(1)
        run.wait_until(lambda: dict(published(run)) == last_offsets(run, numbered(0, 500)))
        assert not counts(run)
        stop(run)
        assert counts(run) == Counter(key for key, _ in numbered(0, 500))
