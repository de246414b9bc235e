"""The workload's strange records mean the same to the worker and to the model, and its options change in any order."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from kafka.errors import KafkaError

from infra.chaos.faults import limits as tight
from infra.harness.events import action, partition_of
from infra.harness.history import LogRecord
from infra.harness.model import Rejected, parse
from infra.harness.poison import KINDS, Outgoing, Template
from infra.harness.topic_reader import HistoryReader
from infra.harness.worker_process import environment
from infra.harness.workload import Workload, WorkloadOptions
from streams.config.settings import Settings
from streams.core.policy import parse_policy
from streams.wire.actions import DecodeLimits, RejectReason, decode_actions
from streams.wire.deletions import Placement
from streams.wire.placement import misplaced, reject_misplaced

PARTITIONS = 4
DRAWS = 60
SEED = 5


@dataclass(frozen=True, slots=True)
class Received:
    """A record as a consumer returns it."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    offset: int
    timestamp: int


def judged_by_worker(message: Outgoing, partition: int, now_ms: int, *, with_values: bool) -> str:
    """Return the reason for which the worker rejects a record; the user and whether it is forgotten if it does not."""
    record = Received(message.key, message.value, message.headers, 7, now_ms)
    limits, placement = DecodeLimits(with_values=with_values), Placement(partition, PARTITIONS)
    decoded = decode_actions([record], now_ms=now_ms, limits=limits, placement=placement)
    wrong = misplaced(decoded.actions.users, partition, PARTITIONS)
    decoded = reject_misplaced(decoded, wrong, [record], partition, PARTITIONS)
    if decoded.rejected:
        return str(decoded.rejected[0].reason)
    return f"{decoded.actions.users[0]!r} {bool(decoded.actions.is_tombstone[0])}"


def judged_by_model(message: Outgoing, partition: int, now_ms: int, *, with_values: bool) -> str:
    """Return the same by the model."""
    record = LogRecord(partition, 7, now_ms, message.key, message.value, message.headers)
    try:
        user, row = parse(record, PARTITIONS, with_values=with_values)
    except Rejected as rejected:
        return str(rejected)
    return f"{user!r} {row is None}"


@pytest.mark.parametrize("with_values", [False, True])
def test_worker_and_model_agree_about_every_strange_record(*, with_values: bool) -> None:
    """Each kind of poison, drawn often for users of all partitions, has one meaning; every reason occurs."""
    rng, now_ms, found = random.Random(SEED), time.time_ns() // 1_000_000, Counter[str]()
    for number in range(DRAWS):
        key, value = action(f"user-{number}", number + 1)
        assert key is not None
        assert value is not None
        for kind in KINDS:
            message = kind(Template(key, value, json.loads(value), PARTITIONS), rng)
            own = partition_of(message.key, PARTITIONS)
            partition = own if message.partition is None else message.partition
            by_model = judged_by_model(message, partition, now_ms, with_values=with_values)
            assert judged_by_worker(message, partition, now_ms, with_values=with_values) == by_model, message
            found[by_model.rsplit(" ", 1)[-1]] += 1
    reasons = {str(reason) for reason in RejectReason} - {"value-too-large"}
    assert set(found) == {*reasons, "True", "False"}


def test_blocks_of_changed_options_end_in_any_order() -> None:
    """A fault that ends takes back its own options and no others, also while the workload rests."""
    workload = Workload(Settings(), SEED, options=WorkloadOptions(rate=9.0))
    first, second = workload.changed(poison=0.5), workload.changed(avoided=frozenset({1}))
    first.__enter__()
    second.__enter__()
    assert (workload.options.poison, workload.options.avoided) == (0.5, frozenset({1}))
    first.__exit__(None, None, None)
    assert (workload.options.poison, workload.options.avoided) == (0.0, frozenset({1}))
    workload.options = WorkloadOptions(rate=3.0)
    second.__exit__(None, None, None)
    assert workload.options == WorkloadOptions(rate=3.0)


@pytest.mark.parametrize("avoided", [frozenset[int](), frozenset({0, 2})])
def test_nothing_is_sent_to_an_avoided_partition(avoided: frozenset[int]) -> None:
    """While a partition of the input has no leader, users of the others go on, strange records included."""
    workload = Workload(Settings(), SEED, options=WorkloadOptions(poison=0.3, avoided=avoided))
    messages = [message for _ in range(400) if workload._is_sendable(message := workload._message())]
    assert {workload._partition(message) for message in messages} == set(range(PARTITIONS)) - avoided


class Leaderless:
    """A consumer whose topic has a partition without a leader, as kafka-python behaves then."""

    is_closed = False

    def end_offsets(self, tps: list[Any], timeout_ms: int) -> dict[Any, int]:
        """Require a short limit, and raise what kafka-python raises."""
        assert timeout_ms < 5_000
        raise KeyError(tps[0])

    def close(self) -> None:
        """Note the call."""
        self.is_closed = True


def test_a_partition_without_a_leader_is_an_answer_that_did_not_come() -> None:
    """The reader of a run reports it as an error of Kafka, and starts over with a client that looks for leaders."""
    reader, consumer = HistoryReader(Settings()), Leaderless()
    reader._consumer = consumer
    with pytest.raises(KafkaError):
        reader.ends()
    assert consumer.is_closed
    assert reader._consumer is None


@pytest.mark.parametrize("values", [tight.FEW_HOT_USERS, tight.SHORT_QUEUE])
def test_tight_limits_are_valid_settings(values: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is restarted with them starts: settings that depend on each other go together."""
    for name, value in environment(values).items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert {key: getattr(getattr(settings, key.split(".")[0]), key.split(".")[1]) for key in values} == values


def test_the_patient_policy_is_valid_and_leaves_no_user_behind() -> None:
    """Its session end makes every user due in the end, without which a run would never come to rest."""
    policy = parse_policy(tight.POLICY)
    assert policy.session_gap_ms > policy.cooldown_ms > 0
    assert policy.every_n > 1
