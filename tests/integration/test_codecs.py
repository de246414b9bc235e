"""Batches of every compression codec: it is the operator's choice, so every reader decompresses all of them."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType

from infra.harness.deployment import deploy
from infra.harness.events import action, send
from infra.harness.run import Run
from infra.harness.whole_topic import count_records
from infra.kafka.topics import topics_of
from streams.config.settings import Settings
from streams.subscriber import EmbeddingSubscriber

pytestmark = [pytest.mark.broker, pytest.mark.slow]
CODECS = ("gzip", "snappy", "lz4", "zstd")
USERS = 20


def compress(settings: Settings, codec: str) -> None:
    """Make the broker store all topics of an application with this codec, regardless of what producers send."""
    resources = [
        ConfigResource(ConfigResourceType.TOPIC, topic.name, {"compression.type": codec})
        for topic in topics_of(settings)
    ]
    with closing(KafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)) as admin:
        admin.alter_configs(resources)


@pytest.mark.parametrize("codec", CODECS)
def test_every_reader_decompresses(broker: Any, topic_prefix: str, tmp_path: Path, codec: str) -> None:
    """Worker, restore, subscriber and topic readers read topics that the broker compresses with any of the codecs."""
    deployment = deploy(tmp_path, broker.bootstrap_servers, topic_prefix)
    settings = deployment.settings
    compress(settings, codec)
    with Run(deployment) as run:
        run.supervisor.scale(1)
        send(settings, [action(f"user-{number}", step) for step in range(3) for number in range(USERS)])
        send(settings, [(b"no user", b"no action")])
        run.wait(1)
        assert run.rest(60), run.busy_with
        run.supervisor.hold(0)
        shutil.rmtree(deployment.data_dir(0))  # so the next start restores every user from the changelog
        run.supervisor.start(0)
        send(settings, [action(f"user-{number}", 3) for number in range(USERS)])
        assert run.rest(60), run.busy_with
        assert [str(violation) for violation in run.judge().violations] == []
        assert not [each for each in run.supervisor.exits if not each.expected]
    with EmbeddingSubscriber(
        broker.bootstrap_servers, topic=settings.topics.embeddings, from_beginning=True
    ) as subscriber:
        assert {one.metadata.sequence_length for one in subscriber.table().values()} == {4}
    assert asyncio.run(count_records(settings, settings.topics.actions)) == 4 * USERS + 1
