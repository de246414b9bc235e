"""The recount reads everything that was committed, on a real broker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka.structs import TopicPartition

from infra.harness.whole_topic import count_records
from infra.harness.worker_process import with_values
from infra.kafka.topics import ensure_topics
from streams.config.settings import load_settings
from streams.engine.changelog import ChangelogNames, ChangelogProducer

pytestmark = pytest.mark.broker
RECORDS = 20
MARKERS_S = 1.0
"""Delay of the commit: long enough that the reader has looked up the end."""


def test_records_of_an_open_transaction_are_waited_for(broker: Any, topic_prefix: str) -> None:
    """The broker acknowledges a commit before it writes its markers; no record may count as lost because of that.

    Here the commit itself is late, which a reader cannot distinguish from late markers.
    """
    settings = with_values(
        load_settings(),
        {
            "app_id": topic_prefix,
            "kafka.bootstrap_servers": broker.bootstrap_servers,
            "topics.actions": f"{topic_prefix}-in",
            "topics.partitions": 1,
        },
    )
    ensure_topics(settings)
    source, changelog = TopicPartition(settings.topics.actions, 0), TopicPartition(settings.changelog_topic, 0)
    names = ChangelogNames(topic_prefix, source, changelog)

    async def scenario() -> int:
        writer = ChangelogProducer(names, settings.kafka.client_options(), transaction_timeout_ms=10_000)
        await writer.start()
        await writer.begin()
        await writer.append([(b"k", b"v")] * RECORDS)
        reading = asyncio.create_task(count_records(settings, settings.changelog_topic))
        await asyncio.sleep(MARKERS_S)
        await writer.commit()
        await writer.stop()
        return await reading

    assert asyncio.run(scenario()) == RECORDS
