"""Fixtures for all tests: one real broker for the run, unique topic names, and default signals."""

from __future__ import annotations

import importlib.util
import re
import signal
import uuid
from collections.abc import Iterator

import hypothesis  # imported early, because CPython 3.11 can fail to parse it late in a run
import pytest

from infra.kafka.broker import Broker, ExternalBroker, broker_or_external

collect_ignore = [] if importlib.util.find_spec("feast") else ["parts"]
"""Tests with other products run in an environment of their own: `make test-parts`."""

hypothesis.settings.register_profile("shared machines", deadline=None)
hypothesis.settings.load_profile("shared machines")


@pytest.fixture(scope="session")
def broker() -> Iterator[Broker | ExternalBroker]:
    """Yield the run's Apache Kafka: our own, or the one at `KAFKA_BOOTSTRAP_SERVERS`."""
    with broker_or_external() as running:
        yield running


@pytest.fixture
def topic_prefix(request: pytest.FixtureRequest) -> str:
    """Return a prefix for the topics, groups and application ids of one test, unique on the shared broker."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:40]
    return f"{name}-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Give a test and the processes that it starts the default SIGINT and SIGTERM.

    A shell starts a background job (`nohup make test &`) with SIGINT ignored, and children inherit that. The run itself
    keeps what the shell intends, so only a test that sends or expects an interrupt uses this fixture.
    """
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
