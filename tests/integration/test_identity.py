"""The logs change underneath a worker: recreated, renamed, expired, grown, and moved by an operator."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import kafka
import pytest
from kafka.structs import OffsetAndMetadata

from infra.harness.deployment import Deployment, deploy
from infra.harness.events import action, partition_of, send
from infra.harness.run import Run
from infra.harness.supervisor import ABORTED, STOPPED
from infra.harness.worker_process import sample
from infra.kafka.topics import ensure_topics
from infra.state.logs import Application
from infra.state.rewrite import producing
from streams.storage.codec import encode_mark
from streams.subscriber import EmbeddingSubscriber

pytestmark = [pytest.mark.broker, pytest.mark.slow]
USERS = [f"user-{number}" for number in range(12)]
GROWN_WITHIN_S = 60


@pytest.fixture
def run(broker: Any, topic_prefix: str, tmp_path: Path) -> Iterator[Run]:
    """Yield a run whose workers are not started yet."""
    with Run(deploy(tmp_path, broker.bootstrap_servers, topic_prefix)) as run:
        yield run


@pytest.fixture
def admin(broker: Any) -> Iterator[Any]:
    """Yield an admin client."""
    admin = kafka.KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    yield admin
    admin.close()


def act(run: Run, users: Sequence[str], first: int, count: int) -> None:
    """Send `count` actions of every user, numbered from `first`."""
    send(run.deployment.settings, [action(user, number) for number in range(first, first + count) for user in users])


def started(run: Run) -> None:
    """Start worker 0 and wait until everything is processed."""
    run.supervisor.scale(1)
    run.wait_until(run.supervisor.is_ready, 40)
    assert run.wait_resumed(30) < 30, run.supervisor.output(0)[-3_000:]


def stopped(run: Run) -> None:
    """Stop the worker in order."""
    run.wait(1.2)
    assert run.supervisor.stop() == {STOPPED: 1}


def refused(run: Run, timeout_s: float = 40) -> str:
    """Start worker 0 and return the line with which it ends itself."""
    exits = len(run.supervisor.exits)
    run.supervisor.scale(1)
    return ended(run, exits, timeout_s)


def ended(run: Run, exits: int, timeout_s: float) -> str:
    """Wait until the worker has ended itself, keep it down, and return its last line."""
    run.wait_until(lambda: len(run.supervisor.exits) > exits, timeout_s)
    run.supervisor.hold(0)
    assert run.supervisor.exits[exits].code == ABORTED
    return run.supervisor.exits[exits].last_line


def halted(run: Run, partition: int) -> str:
    """Start worker 0, wait until it has halted the partition and the others are ready, and return what it reports."""
    run.supervisor.scale(1)
    run.wait_until(lambda: f"partition {partition} is halted" in run.supervisor.output(0), 40)
    run.wait_until(lambda: run.supervisor.output(0).count(" is ready at offset ") == 3, 20)
    status, text = run.supervisor.page(0, "/readyz")
    assert status == 503
    assert run.supervisor.stop() == {STOPPED: 1}
    return text


def state(deployment: Deployment, *arguments: str, code: int = 0) -> str:
    """Run `streamformer state` and return its output; it must end with `code`."""
    command = [sys.executable, "-m", "infra.cli", "state", *arguments, "--config", str(deployment.config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def applied(deployment: Deployment, user: str) -> int:
    """Return how many actions the state of a user contains."""
    return int(json.loads(state(deployment, "show", user))["actions_applied"])


def recreate_source(run: Run, admin: Any) -> None:
    """Delete the source topic and create it again under its name, empty."""
    topic = run.deployment.settings.topics.actions
    admin.delete_topics([topic])
    run.wait_until(lambda: topic not in admin.list_topics(), 20)
    ensure_topics(run.deployment.settings)


def metric(run: Run, name: str) -> float:
    """Return a metric of worker 0."""
    return sample(run.supervisor.page(0, "/metrics")[1], name)


def delete_before(run: Run, admin: Any, partition: int, offset: int) -> None:
    """Delete records of the source topic, as retention does."""
    admin.delete_records({kafka.TopicPartition(run.deployment.settings.topics.actions, partition): offset})


def newest(run: Run) -> dict[str, int]:
    """Return the sequence length of each user's newest embedding, as a new subscriber sees it."""
    settings = run.deployment.settings
    with EmbeddingSubscriber(
        settings.kafka.bootstrap_servers, topic=settings.topics.embeddings, from_beginning=True
    ) as subscriber:
        return {user: each.metadata.sequence_length for user, each in subscriber.table().items()}


def test_a_recreated_source_is_refused_and_its_state_adopted(run: Run, admin: Any) -> None:
    """New events of a recreated topic are never taken for old ones; after `adopt` every sequence continues with them.

    A dry run of `adopt` changes nothing, and a subscriber takes the new embeddings for newer although their source
    offsets are lower.
    """
    act(run, USERS, 1, 20)
    started(run)
    stopped(run)
    recreate_source(run, admin)
    act(run, USERS, 21, 2)
    line = refused(run)
    assert "streamformer state adopt" in line
    assert "new app_id" in line
    assert applied(run.deployment, USERS[0]) == 20
    plan = state(run.deployment, "adopt", "--at", "earliest")
    assert "nothing was changed" in plan
    assert "streamformer state adopt" in refused(run)
    assert f"{len(USERS)} users adopted" in state(run.deployment, "adopt", "--at", "earliest", "--yes")
    started(run)
    run.wait_until(lambda: set(newest(run).values()) == {22}, 20)
    stopped(run)
    assert {applied(run.deployment, user) for user in USERS} == {22}
    state(run.deployment, "verify")
    assert "adopt from" in state(run.deployment, "partitions")


def test_an_adoption_that_was_killed_is_finished_by_another(run: Run, admin: Any) -> None:
    """After a kill between two partitions a start names the command, and a second run of it keeps every sequence."""
    act(run, USERS, 1, 20)
    started(run)
    stopped(run)
    recreate_source(run, admin)
    act(run, USERS, 21, 1)
    command = ["state", "adopt", "--at", "earliest", "--yes", "--config", str(run.deployment.config)]
    adopting = subprocess.Popen([sys.executable, "-u", "-m", "infra.cli", *command], stdout=subprocess.PIPE, text=True)
    assert adopting.stdout is not None
    assert any("continues at offset" in line for line in adopting.stdout)  # of the first partition
    adopting.kill()
    assert adopting.wait() != 0  # three partitions were left
    assert "state adopt" in refused(run)
    assert f"{len(USERS)} users adopted" in state(run.deployment, "adopt", "--at", "earliest", "--yes")
    started(run)
    run.wait_until(lambda: set(newest(run).values()) == {21}, 20)
    stopped(run)
    assert applied(run.deployment, USERS[0]) == 21
    state(run.deployment, "verify")


def test_a_topic_recreated_under_a_running_worker_ends_it(run: Run, admin: Any) -> None:
    """A worker does not go on when its source is deleted and created again while it runs; it says which id it found."""
    act(run, USERS, 1, 3)
    started(run)
    exits = len(run.supervisor.exits)
    recreate_source(run, admin)
    act(run, USERS, 4, 1)
    assert "id of the topic" in ended(run, exits, GROWN_WITHIN_S) or "id of the topic" in refused(run)


def test_another_topic_under_the_same_application_is_refused(run: Run) -> None:
    """State of one source topic is not continued with the offsets of another one."""
    act(run, USERS, 1, 5)
    started(run)
    stopped(run)
    topics = run.deployment.settings.topics
    text = run.deployment.config.read_text()
    run.deployment.config.write_text(text.replace(f'"{topics.actions}"', f'"{topics.actions}-other"'))
    other = run.deployment.settings.model_copy(
        update={"topics": topics.model_copy(update={"actions": f"{topics.actions}-other"})}
    )
    ensure_topics(other)
    line = refused(run)
    assert f"source topic {topics.actions}-other instead of {topics.actions}" in line
    assert "Traceback" not in run.supervisor.output(0)


@pytest.mark.parametrize("how", ["frozen", "stopped"])
def test_events_that_retention_deleted_are_counted_exactly(run: Run, admin: Any, how: str) -> None:
    """30 events that were deleted before the worker read them are 30 in the metric, also if no other event follows."""
    topics = run.deployment.settings.topics
    partition = partition_of(b"ann", topics.partitions)
    act(run, ["ann"], 1, 100)
    started(run)
    if how == "frozen":
        run.wait(1.2)
        run.supervisor.pause(0)
        time.sleep(1)  # a fetch that the broker still holds is over before the first record
    else:
        stopped(run)
    act(run, ["ann"], 101, 30)
    delete_before(run, admin, partition, 130)
    if how == "frozen":
        run.supervisor.resume(0)
    else:
        run.supervisor.scale(1)
    run.wait_until(lambda: metric(run, "streamformer_events_expired_total") == 30, 30)
    act(run, ["ann"], 131, 2)
    run.wait_until(lambda: run.reader.committed().get(partition) == 132, 30)
    assert metric(run, "streamformer_events_expired_total") == 30
    assert run.supervisor.log(0).count("30 events of partition") == 1
    assert not [each for each in run.supervisor.exits if not each.expected]


def test_a_grown_topic_ends_the_worker_within_a_minute(run: Run, admin: Any) -> None:
    """When partitions are added, the worker ends with the line that a start gives."""
    act(run, USERS, 1, 2)
    started(run)
    exits, began = len(run.supervisor.exits), time.monotonic()
    admin.create_partitions({run.deployment.settings.topics.actions: 8})
    run.wait_until(lambda: len(run.supervisor.exits) > exits, GROWN_WITHIN_S)
    assert time.monotonic() - began < GROWN_WITHIN_S
    run.supervisor.hold(0)
    assert "has 8 partitions where the settings say 4" in run.supervisor.exits[exits].last_line


def move_group(run: Run, admin: Any, partition: int, offset: int) -> None:
    """Set the group's committed offset, as `kafka-consumer-groups --reset-offsets` does, once its session is over."""
    tp = kafka.TopicPartition(run.deployment.settings.topics.actions, partition)
    group = run.deployment.settings.app_id
    run.wait_until(lambda: not admin.describe_groups([group])[group]["members"], 20)
    admin.alter_group_offsets(group, {tp: OffsetAndMetadata(offset, "", -1)})


def test_an_offset_moved_forward_is_named_and_skip_follows_it(run: Run, admin: Any) -> None:
    """The worker blames the operator's move and names both commands; `skip` moves over the range and records it."""
    partition = partition_of(b"ann", run.deployment.settings.topics.partitions)
    act(run, ["ann"], 1, 10)
    started(run)
    stopped(run)
    act(run, ["ann"], 11, 10)
    move_group(run, admin, partition, 15)
    line = halted(run, partition)
    assert f"moved the offset of group {run.deployment.settings.app_id}" in line
    assert f"skip --partition {partition} --to 15" in line
    assert "--to 10" in line
    move = ("skip", "--partition", str(partition), "--to", "15")
    assert "skip 5 offsets, 10 to 14" in state(run.deployment, *move)
    state(run.deployment, *move, "--yes")
    started(run)
    stopped(run)
    assert applied(run.deployment, "ann") == 15
    assert "skip from offset 10 to 15" in state(run.deployment, "partitions")


def test_a_log_that_was_cut_and_has_grown_again_halts_and_skip_goes_on(run: Run) -> None:
    """The log holds another record than the state's last one, as after an unclean election: halted until `skip`."""
    settings = run.deployment.settings
    partition = partition_of(b"ann", settings.topics.partitions)
    act(run, ["ann"], 1, 10)
    started(run)
    stopped(run)

    async def remember_another_record() -> None:
        app = await Application.open(settings)
        mark = await app.last_mark(partition)
        assert mark is not None
        assert mark.last is not None
        assert (mark.source_offset, mark.last.offset) == (10, 9)
        other = replace(mark, last=replace(mark.last, checksum=mark.last.checksum ^ 1))
        async with producing(app, partition) as producer:
            await producer.begin()
            await producer.append([encode_mark(other)])
            await producer.send_source_offset(10)
            await producer.commit()

    asyncio.run(remember_another_record())
    act(run, ["ann"], 11, 10)
    assert f"partition {partition} of {settings.topics.actions} holds another record at offset 9" in halted(
        run, partition
    )
    move = ("skip", "--partition", str(partition), "--to", "10")
    assert "truncated and has grown to 20" in state(run.deployment, *move)
    state(run.deployment, *move, "--yes")
    started(run)
    stopped(run)
    assert applied(run.deployment, "ann") == 20


def test_an_offset_moved_back_is_reported_and_nothing_is_applied_twice(run: Run, admin: Any) -> None:
    """The worker says that it continues at its state, counts it, and commits its own offset again."""
    partition = partition_of(b"ann", run.deployment.settings.topics.partitions)
    act(run, ["ann"], 1, 10)
    started(run)
    stopped(run)
    move_group(run, admin, partition, 4)
    run.supervisor.scale(1)
    run.wait_until(lambda: run.reader.committed().get(partition) == 10, 30)
    assert metric(run, "streamformer_offsets_rewound_total") == 1
    assert "back to 4" in run.supervisor.output(0)
    stopped(run)
    assert applied(run.deployment, "ann") == 10


def test_state_moves_to_another_number_of_partitions(run: Run, broker: Any, topic_prefix: str, tmp_path: Path) -> None:
    """`adopt --from-app` moves every user to its partition of a topic with eight; each sequence continues there."""
    act(run, USERS, 1, 20)
    started(run)
    stopped(run)
    name = f"{topic_prefix}-eight"
    eight = deploy(tmp_path / "eight", broker.bootstrap_servers, name, {"topics": {"partitions": 8}})
    with Run(eight) as other:
        act(other, USERS, 21, 1)
        command = ("adopt", "--at", "earliest", "--from-app", run.deployment.settings.app_id)
        state(eight, *command)
        assert "adopted" in state(eight, *command, "--yes")
        state(eight, "verify")
        started(other)
        other.wait_until(lambda: set(newest(other).values()) == {21}, 20)
        stopped(other)
        assert {applied(eight, user) for user in USERS} == {21}
        state(eight, "verify")
        assert "already holds state" in state(eight, *command, "--yes", code=1)


def test_adopt_and_skip_refuse_beside_a_running_worker(run: Run) -> None:
    """A worker would write what is being rewritten, so the commands end with one line while it runs."""
    act(run, USERS, 1, 2)
    started(run)
    for command in (("adopt", "--at", "latest"), ("skip", "--partition", "0", "--to", "0")):
        assert "stop every worker" in state(run.deployment, *command, "--yes", code=1)
    assert run.supervisor.is_ready()


def test_damage_in_the_changelog_is_found_by_verify(run: Run) -> None:
    """`verify` ends with 1 and names the user whose record is not the one that was written."""
    act(run, USERS, 1, 3)
    started(run)
    stopped(run)
    state(run.deployment, "verify")
    settings = run.deployment.settings
    changelog = settings.changelog_topic
    records = run.reader.read_all(changelog)
    head = next(each for each in records if each.key and each.key[:1] == b"u")
    assert head.value is not None
    broken = replace(head, value=head.value[:-1] + bytes((head.value[-1] ^ 1,)))
    producer = kafka.KafkaProducer(bootstrap_servers=settings.kafka.bootstrap_servers)
    producer.send(changelog, key=broken.key, value=broken.value, partition=broken.partition).get(10)
    producer.close()
    assert "the checksum does not match" in state(run.deployment, "verify", code=1)
