r"""One record of Kafka's message format v2, parsed tolerantly: header names need not be UTF-8.

Kafka's protocol calls a header's name a string, but brokers and librdkafka accept any bytes. The parsers of aiokafka
and kafka-python raise on such a name, which would stop a reader for ever at that record. This parser is slower, and is
used only for records at which theirs has raised. A byte that is not UTF-8 becomes text such as `\xff`.
"""

from __future__ import annotations

from typing import NamedTuple


class RawRecord(NamedTuple):
    """A parsed record; its offset and time are relative to those of its batch."""

    end: int
    """Position after the record in the buffer."""
    size: int
    """Size of the record in bytes, without its length field."""
    timestamp_delta: int
    offset_delta: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]


def read_record(buffer: bytes | bytearray, position: int) -> RawRecord:
    """Parse the record at `position` of a decompressed batch; raise ValueError or IndexError if it is malformed."""
    size, start = _varint(buffer, position)
    timestamp_delta, at = _varint(buffer, start + 1)  # one byte of attributes, unused
    offset_delta, at = _varint(buffer, at)
    key, at = _bytes(buffer, at)
    value, at = _bytes(buffer, at)
    count, at = _varint(buffer, at)
    headers: list[tuple[str, bytes | None]] = []
    for _ in range(count):
        name, at = _bytes(buffer, at)
        if name is None:
            raise ValueError("a header has no name")
        content, at = _bytes(buffer, at)
        headers.append((name.decode(errors="backslashreplace"), content))
    if count < 0 or at - start != size:
        raise ValueError(f"the record says {size} bytes and has {at - start}")
    return RawRecord(at, size, timestamp_delta, offset_delta, key, value, headers)


def _bytes(buffer: bytes | bytearray, position: int) -> tuple[bytes | None, int]:
    length, begin = _varint(buffer, position)
    if length < 0:
        return None, begin
    if begin + length > len(buffer):
        raise ValueError(f"a field of {length} bytes reaches beyond the batch")
    return bytes(buffer[begin : begin + length]), begin + length


def _varint(buffer: bytes | bytearray, position: int) -> tuple[int, int]:
    """Return a zigzag-coded number and the position after it."""
    raw = shift = 0
    while True:
        byte = buffer[position]
        position += 1
        raw |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (raw >> 1) ^ -(raw & 1), position
        shift += 7
        if shift > 63:
            raise ValueError("a number has more than ten bytes")
