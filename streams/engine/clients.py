"""The clients of Kafka that the engine uses, in one place, so that another transport can take their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiokafka

from streams.engine.cluster import Cluster


@dataclass(frozen=True, slots=True)
class Clients:
    """The classes of producers, consumers and the cluster's description; each takes the connection options."""

    producer: Callable[..., Any] = aiokafka.AIOKafkaProducer
    consumer: Callable[..., Any] = aiokafka.AIOKafkaConsumer
    cluster: Callable[..., Cluster] = Cluster


KAFKA = Clients()
"""A real cluster."""
