"""Overrides inside Faust and aiokafka, installed by one visible call: `install_overrides`.

Consumers with a group get the coordinator of `streams.engine.membership`.

Private parts relied upon, held by tests/contract/test_faust_insides.py: `aiokafka.consumer.fetcher.PartitionRecords`
(`__init__`, `__iter__`, `__next__`, `_unpack_records`, `_consumer_record`, `_consume_aborted_up_to`,
`_contains_abort_marker`), `Fetcher._proc_fetch_request`, `FetchResult.getall`, and
`aiokafka.record.default_records._DefaultRecordBatchPy` (`_read_msg`, `__next__`).
"""

from __future__ import annotations

import logging

from aiokafka.consumer import consumer, fetcher
from faust import stores

from streams.engine.membership import AnotherTopicFilter, WatchedCoordinator
from streams.engine.records import ParsedRecords, ResponseRecords

STORE_SCHEME = "streamformer-rocksdb"
STORE_URL = f"{STORE_SCHEME}://"
STORE_CLASS = "streams.engine.table:SequenceStore"


def install_overrides() -> None:
    """Replace the names inside Faust and aiokafka that the engine needs changed; a second call changes nothing."""
    fetcher.MemoryRecords = ResponseRecords
    fetcher.PartitionRecords = ParsedRecords
    consumer.GroupCoordinator = WatchedCoordinator
    log = logging.getLogger("aiokafka.consumer.group_coordinator")
    if not any(isinstance(each, AnotherTopicFilter) for each in log.filters):
        log.addFilter(AnotherTopicFilter())
    stores.STORES.aliases[STORE_SCHEME] = STORE_CLASS
