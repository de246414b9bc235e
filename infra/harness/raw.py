"""Produce record batches that no client library would make, over a socket of our own."""

from __future__ import annotations

import socket
import struct
import time

from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c

PRODUCE, VERSION = 0, 3
PLACEHOLDER = "~~"
CRC_AT, COVERED_FROM = 17, 21
ANSWER_S = 10.0


def batch_with_header(key: bytes | None, value: bytes | None, name: bytes) -> bytes:
    """Return a batch of one record whose header has a name of two arbitrary bytes."""
    builder = DefaultRecordBatchBuilder(2, 0, False, -1, -1, -1, 1 << 20)
    builder.append(0, time.time_ns() // 1_000_000, key, value, [(PLACEHOLDER, b"x")])
    batch = bytes(builder.build()).replace(PLACEHOLDER.encode(), name)
    checksum = calc_crc32c(batch[COVERED_FROM:])
    return batch[:CRC_AT] + struct.pack(">I", checksum) + batch[COVERED_FROM:]


def produce(server: str, topic: str, partition: int, batch: bytes) -> None:
    """Send one batch to the leader of a partition; raise `RuntimeError` if the broker rejects it."""
    body = struct.pack(">hhih", PRODUCE, VERSION, 1, -1)  # no client id
    body += struct.pack(">hhi", -1, -1, 10_000)  # no transaction, all replicas, timeout
    body += struct.pack(">ih", 1, len(topic)) + topic.encode()
    body += struct.pack(">iii", 1, partition, len(batch)) + batch
    host, _, port = server.partition(":")
    with socket.create_connection((host, int(port)), ANSWER_S) as connection:
        connection.sendall(struct.pack(">i", len(body)) + body)
        answer = connection.makefile("rb").read(4 + 4 + 4 + 2 + len(topic) + 4 + 4 + 2)
    (error,) = struct.unpack(">h", answer[-2:])
    if error:
        raise RuntimeError(f"the broker answers a produce request with error {error}")
