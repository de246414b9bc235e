"""Workers driven to their limits on a real broker, and what that costs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from infra.harness.deployment import deploy
from infra.harness.events import action, send
from infra.harness.run import Run
from infra.harness.worker_process import sample

pytestmark = [pytest.mark.broker, pytest.mark.slow]


def faulty(fault: str) -> Sequence[str]:
    """Return the command of a worker whose encoder has a fault."""
    return (sys.executable, "-m", "infra.harness.faulty_worker", fault, "worker")


def metric(run: Run, name: str, labels: str = "") -> float:
    """Return a metric of worker 0, summed over its labels."""
    return sample(run.supervisor.page(0, "/metrics")[1], name, labels)


def reasons(run: Run) -> dict[bytes, bytes]:
    """Return the reason of each published user's last embedding, in order of publication."""
    records = run.reader.read_all(run.deployment.settings.topics.embeddings)
    return {each.key or b"": dict(each.headers)["reason"] for each in records}


def limited(
    broker: Any, prefix: str, folder: Path, fault: str, **settings: dict[str, Any]
) -> AbstractContextManager[Run]:
    """Return a run of workers with a faulty encoder, one partition and these settings."""
    topics = {"topics": {"partitions": 1}}
    return Run(deploy(folder, broker.bootstrap_servers, prefix, {**topics, **settings}), faulty(fault))


def test_a_strong_action_overtakes_and_shed_users_cost_nothing(broker: Any, topic_prefix: str, tmp_path: Path) -> None:
    """Of 300 users at a slow encoder with room for 100, one that waits and buys is next; shed ones write nothing."""
    policy = tmp_path / "policy.toml"
    policy.write_text('[triggers]\nevery_n = 1\nstrong = ["buy"]\n')
    queue = {"users_max": 100, "batch_users_max": 4}
    triggers = {"policy_file": str(policy)}
    with limited(broker, topic_prefix, tmp_path, "held", queue=queue, triggers=triggers) as run:
        run.supervisor.scale(1)
        run.wait_until(run.supervisor.is_ready)
        users = [f"user-{number}" for number in range(300)]
        send(run.deployment.settings, [action(user, 1) for user in users])
        run.wait_until(lambda: metric(run, "streamformer_shed_total") > 0)
        run.wait(2)  # every first head is written
        written = metric(run, "streamformer_changelog_records_total")
        encoded = metric(run, "streamformer_embeddings_published_total")
        run.wait(3)
        published = metric(run, "streamformer_embeddings_published_total") - encoded
        records = metric(run, "streamformer_changelog_records_total") - written
        print(f"{records:.0f} changelog records in 3 s for {published:.0f} embeddings and about 200 shed users")
        assert records <= published + 4 + 8  # one per embedding, and a mark per checkpoint
        waiting = [user for user in users if user.encode() not in reasons(run)]
        sent_s = time.monotonic()
        send(run.deployment.settings, [action(waiting[-1], 2, action="buy")])
        run.wait_until(lambda: reasons(run).get(waiting[-1].encode()) == b"strong")
        print(f"published {time.monotonic() - sent_s:.1f} s after the strong action, {len(waiting)} users were waiting")
        assert len(reasons(run)) < len(users) - 40


def test_one_bad_user_costs_the_others_nothing(broker: Any, topic_prefix: str, tmp_path: Path) -> None:
    """The encoder raises on one of 2,000 users: the others are published, and the worker is ready."""
    cache = {"cache_bytes_max": 64 << 20}  # room for all users, on every processor
    with limited(broker, topic_prefix, tmp_path, "raises", encoder=cache) as run:
        run.supervisor.scale(1)
        run.wait_until(run.supervisor.is_ready)
        users = [f"user-{number}" for number in range(2_000)]
        send(run.deployment.settings, [action(user, 1) for user in [*users, "bad"]])
        run.wait_until(lambda: metric(run, "streamformer_embeddings_published_total") >= len(users))
        run.wait_until(lambda: metric(run, "streamformer_unencodable_users_total") == 1)
        failures = metric(run, "streamformer_encode_failures_total")
        prefills = metric(run, "streamformer_cache_prefills_total")
        send(run.deployment.settings, [action(user, 2) for user in [*users, "bad"]])
        run.wait_until(lambda: metric(run, "streamformer_embeddings_published_total") >= 2 * len(users))
        print(f"{failures:.0f} failed calls, then {metric(run, 'streamformer_encode_failures_total') - failures:.0f}")
        assert failures <= 13
        assert metric(run, "streamformer_encode_failures_total") <= failures + 1
        assert metric(run, "streamformer_cache_prefills_total") == prefills
        assert run.supervisor.is_ready()


def test_users_without_an_action_for_the_ttl_are_forgotten(broker: Any, topic_prefix: str, tmp_path: Path) -> None:
    """A tombstone replaces the embedding within seconds, also of users from before a restart; they can start again."""

    def now(user: str, number: int) -> Any:
        return action(user, number, timestamp_ms=time.time_ns() // 1_000_000)

    topics, state = {"topics": {"partitions": 1}}, {"state": {"user_ttl_ms": 3_000}}
    with Run(deploy(tmp_path, broker.bootstrap_servers, topic_prefix, {**topics, **state})) as run:
        run.supervisor.scale(1)
        run.wait_until(run.supervisor.is_ready)
        send(run.deployment.settings, [now("ann", 1), now("bob", 1)])
        run.wait_until(lambda: metric(run, "streamformer_embeddings_published_total") == 2)
        run.wait(1.5)  # a checkpoint
        run.supervisor.kill(0)
        run.wait_until(lambda: not run.supervisor.is_ready())
        run.wait_until(run.supervisor.is_ready)
        send(run.deployment.settings, [now("cat", 1)])
        run.wait_until(lambda: metric(run, "streamformer_users_expired_total") >= 2)
        send(run.deployment.settings, [now("ann", 2)])
        newest: dict[bytes | None, Any] = {}

        def published() -> bool:
            newest.update((each.key, each) for each in run.reader.read_all(run.deployment.settings.topics.embeddings))
            return newest[b"bob"].value is None and newest[b"ann"].value is not None

        run.wait_until(published)
        assert dict(newest[b"ann"].headers)["sequence-length"] == b"1"
        assert dict(newest[b"bob"].headers)["source-offset"] == b"2"
