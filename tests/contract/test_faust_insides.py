"""The private parts of Faust and aiokafka that `streams.engine` overrides or reads.

A new release that renames one, changes its parameters or rewrites its body fails here first, with its name, instead
of losing an event in production. After reading what changed, record the new fingerprint.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiokafka
import pytest
from aiokafka.consumer.group_coordinator import CoordinatorGroupRebalance, GroupCoordinator
from aiokafka.consumer.subscription_state import TopicPartitionState
from aiokafka.producer.message_accumulator import MessageAccumulator
from aiokafka.producer.sender import Sender
from faust import App
from faust.assignor.partition_assignor import PartitionAssignor
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.transport.consumer import Consumer
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread
from kafka.consumer import fetcher as kafka_fetcher
from kafka.record.default_records import DefaultRecordBatch

from streams.engine.records import ParsedRecords

PARTITION_RECORDS = ParsedRecords.__mro__[1]
"""aiokafka's own class, whose name in its module is ours."""

INSIDES: dict[Any, dict[str, str]] = {
    Consumer: {
        "getmany": "4b168d84882a",
        "_wait_next_records": "6218e1969a63",
        "_drain_messages": "44a2500309e8",
        "_add_gap": "4df2573ded7c",
        "_get_active_partitions": "b24897f3c7af",
        "_filter_tps_with_pending_acks": "f6f923977423",
        "wait_empty": "e4662fe24f09",
        "pause_partitions": "27a1c94bdacd",
        "resume_partitions": "afe6b7c02a41",
        "stop_flow": "cf7e875a2b0d",
        "resume_flow": "db59630f25b5",
    },
    AIOKafkaConsumerThread: {
        "_fetch_records": "39a2c6c79fc1",
        "_seek_wait": "9d221e816d94",
        "_create_worker_consumer": "c2701bfc3e6f",
    },
    Recovery: {
        "on_rebalance": "aa4d997a1795",
        "_resume_streams": "d986a6710c1a",
        "on_recovery_completed": "6ef567acf072",
    },
    TableManager: {
        "on_start": "365dd25fbc0e",
        "_update_channels": "88e3941facc9",
        "on_rebalance": "2d2c23a07bf5",
        "on_stop": "351be149c036",
    },
    App: {
        "_on_partitions_revoked": "d5c895bbe57d",
        "_on_partitions_assigned": "de932b7927db",
        "_stop_consumer": "55854a5de12c",
    },
    TopicPartitionState: {"consumed_to": "c7b8f0f99ce9", "seek": "c20b56d7ba7b", "await_reset": "7b5a780dd629"},
    aiokafka.consumer.fetcher.Fetcher: {
        "fetched_records": "be4348896b9b",
        "end_offsets": "d03333ff4f87",
        "_proc_fetch_request": "59bf948fff47",
    },
    Sender: {"close": "f60b3d023d25", "_fail_all": "5a67e3b6f87b"},
    MessageAccumulator: {"fail_all": "f1e12e8100bf", "_pop_batch": "41cc98a298ef", "add_batch": "5ed1c5b1367a"},
    PARTITION_RECORDS: {
        "__init__": "8ec1c2ae6ea1",
        "__iter__": "b411eeeaeb7c",
        "__next__": "63ac34a08c30",
        "_unpack_records": "b803e6d46480",
        "_consumer_record": "e668541600b0",
        "_consume_aborted_up_to": "56876530cd64",
        "_contains_abort_marker": "17e9ad2322ef",
    },
    GroupCoordinator: {
        "_send_req": "fa4b12e914ce",
        "reset_generation": "537aa37c531b",
        "_coordination_routine": "75273e127d4a",
        "_push_error_to_user": "743ff515bd7e",
        "_heartbeat_routine": "61d010289522",
        "_do_heartbeat": "dc1d6632aaa6",
    },
    CoordinatorGroupRebalance: {"perform_group_join": "ff2c2109b2e9", "_send_sync_group_request": "7429ca078ddf"},
    PartitionAssignor: {"on_assignment": "72f34bf053d6", "_url": "a1c9e893ba7e", "_metadata": "966368ad7e0c"},
    aiokafka.record.default_records._DefaultRecordBatchPy: {"_read_msg": "0997ab7a5850", "__next__": "d05784bae3cb"},
    kafka_fetcher.Fetcher: {"_parse_fetched_data": "3cd93b6d3b7b"},
    kafka_fetcher.Fetcher.PartitionRecords: {"_unpack_records": "d91ccce28d83"},
    DefaultRecordBatch: {"_read_msg": "b203a6ee5e4f"},
    aiokafka.consumer.fetcher.FetchResult: {"getall": "3e717e30de50"},
}


def fingerprint(function: Callable[..., Any]) -> str:
    """Return a short hash of a function's source text."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [(owner, name, expected) for owner, names in INSIDES.items() for name, expected in names.items()],
    ids=lambda value: value.__name__ if inspect.isclass(value) else str(value),
)
def test_inside_is_as_it_was_read(owner: Any, name: str, expected: str) -> None:
    """The source text of this method is the one that the engine was written against."""
    found = inspect.getattr_static(owner, name)
    source = found.fget if isinstance(found, property) else found
    assert fingerprint(source) == expected, f"{owner.__name__}.{name} has changed: read it"


def test_consumer_attributes_that_are_set_exist() -> None:
    """The three attributes that the engine sets on aiokafka's consumer are read there under these names."""
    source = Path(inspect.getfile(aiokafka.AIOKafkaConsumer)).read_text()
    assert "self._fetch_max_wait_ms" in source
    assert "self._isolation_level" in source
    assert "key_deserializer=self._key_deserializer" in source
