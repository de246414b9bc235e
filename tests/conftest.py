"""What tests share: one real broker for the run, and names that no other test uses."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator

import hypothesis  # early: CPython 3.11 can fail to parse it late in a run, where its pytest plugin would import it
import pytest

from infra.kafka.broker import Broker, ExternalBroker, broker_or_external

hypothesis.settings.register_profile("shared machines", deadline=None)
hypothesis.settings.load_profile("shared machines")


@pytest.fixture(scope="session")
def broker() -> Iterator[Broker | ExternalBroker]:
    """The run's Apache Kafka: our own, or the one at `KAFKA_BOOTSTRAP_SERVERS`."""
    with broker_or_external() as running:
        yield running


@pytest.fixture
def topic_prefix(request: pytest.FixtureRequest) -> str:
    """A prefix for the topics, groups and application ids of one test, unique on the shared broker."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:40]
    return f"{name}-{uuid.uuid4().hex[:8]}"
