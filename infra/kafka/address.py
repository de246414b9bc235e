"""Checks that a broker answers at an address, before a client spends its retries on one where nothing listens."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import kafka
from kafka.errors import KafkaError

from infra.errors import InfraError, detail

ANSWER_MS = 30_000
CONNECT_S = 5.0


class BrokerFailed(InfraError):
    """A broker did not start, or nothing answers at the address of one."""


def require_broker(options: Mapping[str, Any]) -> None:
    """Raise `BrokerFailed` unless a broker answers; `options` are kafka-python's, `bootstrap_servers` among them."""
    servers = options["bootstrap_servers"]
    try:
        require_listener(servers)
        kafka.KafkaAdminClient(bootstrap_timeout_ms=ANSWER_MS, **options).close()
    except (KafkaError, OSError, ValueError) as error:
        raise BrokerFailed(
            f"no Kafka broker answers at {servers}",
            detail(error),
            "start it (`streamformer broker`), or correct the address",
        ) from error


def require_listener(servers: str) -> None:
    """Raise OSError at once when nothing listens: a Kafka client would try again until its time is over."""
    refused: OSError | None = None
    for server in servers.split(","):
        host, _, port = server.strip().rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        except OSError as error:
            refused = error
        else:
            return
    raise refused or OSError("no address given")
