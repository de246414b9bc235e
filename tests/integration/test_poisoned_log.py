"""Logs that stop other readers: strange header names, damaged batches, open and aborted transactions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiokafka
import kafka
import pytest

from infra.harness.deployment import Deployment, Overrides, deploy
from infra.harness.events import Event, action, partition_of, send
from infra.harness.run import Run
from infra.harness.worker_process import sample
from infra.kafka.broker import Broker

pytestmark = [pytest.mark.broker, pytest.mark.slow]
PARTITIONS = 4


class RawName(str):
    """A header name that kafka-python writes as bytes which are not UTF-8."""

    __slots__ = ()

    def encode(self, *_: Any) -> bytes:
        """Return what goes to the broker."""
        return b"\xff\xfe"


def user_of(partition: int, prefix: str = "user") -> str:
    """Return a user id whose partition is the given one."""
    return next(
        user
        for user in (f"{prefix}-{number}" for number in range(1_000))
        if partition_of(user.encode(), PARTITIONS) == partition
    )


def send_named(deployment: Deployment, events: Sequence[Event]) -> None:
    """Send events with a header name that is not UTF-8."""
    producer = kafka.KafkaProducer(bootstrap_servers=deployment.settings.kafka.bootstrap_servers)
    for key, value in events:
        topic, partition = deployment.settings.topics.actions, partition_of(key, PARTITIONS)
        producer.send(topic, key=key, value=value, headers=[(RawName(), b"1")], partition=partition).get(timeout=10)
    producer.close()


def start(broker: Any, name: str, folder: Path, overrides: Overrides | None = None) -> Run:
    """Return a run with one worker that has started."""
    run = Run(deploy(folder, broker.bootstrap_servers, name, overrides))
    run.supervisor.scale(1)
    run.wait_until(run.supervisor.is_ready)
    return run


def metric(run: Run, name: str, labels: str = "") -> float:
    """Return one number that worker 0 reports."""
    return sample(run.supervisor.page(0, "/metrics")[1], name, labels)


def lag(run: Run) -> float:
    """Return the records that wait in all partitions."""
    return sum(metric(run, "streamformer_consumer_lag_records", f'partition="{one}"') for one in range(PARTITIONS))


def test_a_header_name_of_any_bytes_stops_nobody(broker: Any, topic_prefix: str, tmp_path: Path) -> None:
    """Valid actions with such a header are applied, invalid ones are dead letters, and readers read both topics."""
    with start(broker, topic_prefix, tmp_path) as run:
        send_named(run.deployment, [action("ann", 1), (b"ann", b"no action"), action("bob", 1)])
        send(run.deployment.settings, [action("ann", 2)])
        assert run.rest(60), run.busy_with
        assert [str(violation) for violation in run.judge().violations] == []
        (dead,) = run.reader.read_all(run.deployment.settings.topics.dead_letter)
        assert dict(dead.headers)["error-reason"] == b"not-json"
        assert dict(dead.headers)["\\xff\\xfe"] == b"1"
        assert not run.supervisor.exits


def damage(broker: Broker, topic: str, partition: int, text: bytes) -> None:
    """Change one byte of a record on the broker's disk, so that the checksum of its batch is wrong."""
    (file,) = [path for path in broker.folder.rglob(f"{topic}-{partition}/*.log") if text in path.read_bytes()]
    at = file.read_bytes().index(text)
    with file.open("r+b") as log:
        log.seek(at)
        log.write(b"X")


@pytest.mark.parametrize("skip", [False, True])
def test_a_damaged_batch_halts_its_partition_or_is_skipped(
    broker: Any, topic_prefix: str, tmp_path: Path, skip: bool
) -> None:
    """The damage is named with its offsets, the other partitions go on, and only the setting skips the batch."""
    if not isinstance(broker, Broker):
        pytest.skip("needs a broker whose disk can be damaged")
    damaged, other = user_of(0), user_of(1)
    run = Run(deploy(tmp_path, broker.bootstrap_servers, topic_prefix, {"kafka": {"skip_corrupt_batches": skip}}))
    with run:
        settings = run.deployment.settings
        for number, item in enumerate(("first", "damaged-item", "last")):
            send(settings, [action(damaged, number, item_id=item), action(other, number)])
        damage(broker, settings.topics.actions, 0, b"damaged-item")
        run.supervisor.scale(1)
        run.wait_until(lambda: run.reader.committed().get(1) == 3)
        wanted = 3 if skip else 1
        run.wait_until(lambda: run.reader.committed().get(0) == wanted)
        run.wait(2)
        assert run.reader.committed()[0] == wanted
        named = f"topic {settings.topics.actions}, partition 0, offsets 1 to 1, cannot be read"
        assert named in run.supervisor.log(0)
        assert run.supervisor.is_ready() == skip
        if skip:
            assert metric(run, "streamformer_corrupt_records_skipped_total") == 1
        else:
            assert named in run.supervisor.page(0, "/readyz")[1]
            assert metric(run, "streamformer_partitions", 'state="halted"') == 1
        assert not run.supervisor.exits


def test_transactions_that_are_open_or_aborted_stop_nobody(broker: Any, topic_prefix: str, tmp_path: Path) -> None:
    """Beside an open transaction the worker stays live and ready beyond the watchdog; aborted records leave no lag."""
    with start(broker, topic_prefix, tmp_path, {"worker": {"watchdog_timeout_ms": 3_000}}) as run:
        settings = run.deployment.settings
        user, key = user_of(2), user_of(2).encode()

        async def produce() -> None:
            producer = aiokafka.AIOKafkaProducer(
                bootstrap_servers=settings.kafka.bootstrap_servers, transactional_id=topic_prefix
            )
            await producer.start()
            await producer.begin_transaction()
            await producer.send_and_wait(settings.topics.actions, action(user, 1)[1], key=key, partition=2)
            await asyncio.to_thread(run.wait, 8)
            assert run.supervisor.is_ready()
            assert metric(run, "streamformer_open_transaction_records", 'partition="2"') == 1
            assert lag(run) == 0
            await producer.commit_transaction()
            await producer.begin_transaction()
            for number in range(100):
                await producer.send(settings.topics.actions, action(user, 2 + number)[1], key=key, partition=2)
            await producer.flush()
            await producer.abort_transaction()
            await producer.stop()

        asyncio.run(produce())
        end = run.reader.ends()[2]
        assert end == 103  # one record and its marker, a hundred records and theirs
        run.wait_until(lambda: run.reader.committed().get(2) == end, 15)
        run.wait_until(lambda: lag(run) == 0, 10)
        assert len(run.reader.read_all(settings.topics.embeddings)) == 1
        run.supervisor.kill(0)
        run.wait_until(lambda: run.supervisor.is_ready() and time.sleep(3) is None and run.supervisor.is_ready())
        assert lag(run) == 0
        assert [each.expected for each in run.supervisor.exits] == [True]
