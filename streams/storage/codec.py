"""The bytes of a user's state: what goes to the changelog topic and, unchanged, to RocksDB.

Three kinds of records, distinguished by the first byte of the key (`streams.storage.features` adds a fourth):

    record  key                        value, with the bytes of each part
    head    `u`, user id               header (80), tail actions (32 each), checksum (4)
    chunk   `c`, user id, chunk key    version (1), 0 (1), C (2), chunk number (8), C actions (32 each), checksum (4)
    mark    `m`                        version (1), source offset (8), output offset (8), JSON, checksum (4)

- The *head* holds a user's header (`streams.core.layout.HEADER_DTYPE`, which begins with version, flags, reason and the
  number of tail actions) and the actions after the last complete chunk. A user with fewer than C actions has no other
  record.
- A *chunk* holds C actions. Chunk number k has the chunk key `k mod (M / C + 1)`, one byte, so a user never has more
  than M / C + 1 chunk records. The number inside distinguishes the wanted chunk from another one under the same key.
- The *mark* is the last record of each checkpoint. It contains the source offset that the checkpoint commits, and the
  offset in the output topic before which the state accounts for every output. Since version 2 it also contains, as one
  JSON object, the identity of the logs that these offsets belong to, the last record of the source that the state
  contains, and what operators did to the position. Version 1 had no JSON; it is read as a mark of unknown identity.

All numbers are little-endian. The checksum is CRC-32 over key and value, so a value under a wrong key is detected, too.
A deleted record has the value None. The version is the first byte of every value. Each version ever written keeps its
decoder, and a value of an unknown version raises `CorruptValue` instead of being guessed at.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from encoder.actions.columns import ACTION_DTYPE, Actions
from streams.core.columns import Columns
from streams.core.layout import HAD_DEADLINE, HEADER_DTYPE, NEVER, STATE_VERSION, Snapshot, StateLimits
from streams.errors import RebuildsPartition, StopsWorker
from streams.storage.identity import Identity, LastRecord

Records = list[tuple[bytes, bytes | None]]

HEAD_PREFIX = b"u"
"""First byte of the key of a head; the user id follows."""
CHUNK_PREFIX = b"c"
"""First byte of the key of a chunk; the user id and the chunk key (one byte) follow."""
MARK_KEY = b"m"
"""Key of the checkpoint mark, one record per partition."""
MARK_VERSION = 2
OPERATIONS_KEPT = 8
"""Operations that a mark keeps; older ones are only in the log of the command."""
_MARK = struct.Struct("<Bqq")
_CHUNK_HEAD = np.dtype([("version", "u1"), ("zero", "u1"), ("chunk_length", "<u2"), ("number", "<i8")])
HEAD_BYTES, ACTION_BYTES = HEADER_DTYPE.itemsize, ACTION_DTYPE.itemsize
_CHUNK_HEAD_BYTES, _CHECKSUM_BYTES = _CHUNK_HEAD.itemsize, 4
_VERSION_BYTE = bytes((STATE_VERSION,))
assert HEADER_DTYPE.fields is not None
_DUE_MS_AT = HEADER_DTYPE.fields["due_ms"][1]
_NEVER_BYTES = NEVER.to_bytes(8, "little", signed=True)


class CorruptValue(RebuildsPartition):
    """A stored value is not the one that was written; its user must be rebuilt or quarantined."""

    def __init__(self, key: bytes, detail: str) -> None:
        self.key = key
        super().__init__(f"value of {key!r} is corrupt: {detail}; rebuild the partition from the changelog")


class LayoutChanged(StopsWorker):
    """The state was written with a sequence or chunk length other than that of the settings."""


@dataclass(frozen=True, slots=True)
class CheckpointMark:
    """The position of a checkpoint in the source partition and in the output topic."""

    source_offset: int
    """Offset of the next event to apply, which the checkpoint's transaction commits."""
    output_offset: int
    """Offset before which the state accounts for every output."""
    identity: Identity | None = None
    """Logs that the offsets belong to; None in a mark of version 1."""
    life: int = 0
    """Number of times that the position was moved back or to another log, after which source offsets start over."""
    unfinished: str = ""
    """Command that has begun to rewrite the state and has not ended; a worker must not start. Empty otherwise."""
    operations: tuple[str, ...] = ()
    """What operators did to the position, oldest first, at most `OPERATIONS_KEPT`."""
    last: LastRecord | None = None
    """Last record before `source_offset`; None if none is known, as in marks of earlier releases."""
    features_offset: int = 0
    """Offset in the features topic before which the state accounts for every record; 0 where there are none."""

    @property
    def source_id(self) -> str:
        """Text that outputs carry, so that source offsets of different lives are never compared; empty if unknown."""
        topic_id = self.identity.source_topic_id if self.identity else ""
        return f"{topic_id}/{self.life}" if self.life and topic_id else topic_id


def head_key(user: bytes) -> bytes:
    """Return the key of a user's head."""
    return HEAD_PREFIX + user


def chunk_key(user: bytes, number: int, limits: StateLimits) -> bytes:
    """Return the key of chunk number `number` of a user."""
    return CHUNK_PREFIX + user + bytes((number % limits.chunk_keys,))


def encode(snapshot: Snapshot, limits: StateLimits) -> Records:
    """Return the records of a snapshot; the chunks of a user come before its head."""
    return [*_encode_chunks(snapshot, limits), *_encode_heads(snapshot)]


def largest_value(limits: StateLimits) -> int:
    """Return the size of the largest value: a head with a full tail."""
    return HEAD_BYTES + ACTION_BYTES * limits.chunk_length + _CHECKSUM_BYTES


def encode_mark(mark: CheckpointMark) -> tuple[bytes, bytes]:
    """Return the record that ends a checkpoint."""
    details: dict[str, Any] = {"identity": mark.identity.as_json()} if mark.identity else {}
    for name in ("life", "unfinished", "operations", "features_offset"):
        if value := getattr(mark, name):
            details[name] = value
    if mark.last is not None:
        details["last"] = mark.last.as_json()
    body = _MARK.pack(MARK_VERSION, mark.source_offset, mark.output_offset) + json.dumps(details).encode()
    return MARK_KEY, seal(MARK_KEY, body)


def decode_mark(value: bytes) -> CheckpointMark:
    """Decode a mark of any version; raise `CorruptValue` if it is not one."""
    body = unseal(MARK_KEY, value, versions=(1, MARK_VERSION))
    if len(body) < _MARK.size or (body[0] == 1 and len(body) != _MARK.size):
        raise CorruptValue(MARK_KEY, f"{len(value)} bytes")
    version, source_offset, output_offset = _MARK.unpack_from(body)
    if version == 1:
        return CheckpointMark(source_offset, output_offset)
    try:
        details = json.loads(body[_MARK.size :])
        identity = Identity.from_json(details["identity"]) if "identity" in details else None
        operations = tuple(map(str, details.get("operations", ())))
        life, unfinished = int(details.get("life", 0)), str(details.get("unfinished", ""))
        features_offset = int(details.get("features_offset", 0))
        last = LastRecord.from_json(details.get("last"))
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptValue(MARK_KEY, f"its details cannot be read: {error}") from error
    found = identity, life, unfinished, operations, last, features_offset
    return CheckpointMark(source_offset, output_offset, *found)


def decode_head(user: bytes, value: bytes) -> tuple[Columns, Actions]:
    """Return the header [1] of HEADER_DTYPE and the tail actions; raise `CorruptValue` if `value` is not a head."""
    key = head_key(user)
    body = unseal(key, value)
    if len(body) < HEAD_BYTES or len(body) != HEAD_BYTES + ACTION_BYTES * body[3]:  # byte 3: number of tail actions
        raise CorruptValue(key, f"its {len(value)} bytes do not match its number of actions")
    return np.frombuffer(body, HEADER_DTYPE, 1), np.frombuffer(body, ACTION_DTYPE, offset=HEAD_BYTES)


def decode_chunk(user: bytes, number: int, value: bytes | None, limits: StateLimits) -> Actions:
    """Return the C actions of chunk `number`; raise `CorruptValue`, also if it is missing or another chunk."""
    key = chunk_key(user, number, limits)
    if value is None:
        raise CorruptValue(key, f"chunk {number} is missing")
    body = unseal(key, value)
    head = np.frombuffer(body, _CHUNK_HEAD, 1)[0] if len(body) >= _CHUNK_HEAD_BYTES else None
    if head is None or len(body) != _CHUNK_HEAD_BYTES + ACTION_BYTES * int(head["chunk_length"]):
        raise CorruptValue(key, f"its {len(value)} bytes do not match its number of actions")
    if head["number"] != number or head["chunk_length"] != limits.chunk_length:
        raise CorruptValue(key, f"holds chunk {head['number']} instead of {number}")
    return np.frombuffer(body, ACTION_DTYPE, offset=_CHUNK_HEAD_BYTES)


def deadline_of(head: bytes) -> int:
    """Return `due_ms` of a head's value without checking the value; the index of deadlines is built from it."""
    return int.from_bytes(head[_DUE_MS_AT : _DUE_MS_AT + 8], "little", signed=True)


def has_deadline(head: bytes) -> bool:
    """Return whether a head's value has a deadline, as `deadline_of` would; most have none, and this is faster."""
    return head[_DUE_MS_AT : _DUE_MS_AT + 8] != _NEVER_BYTES


def had_deadline(head: bytes) -> bool:
    """Return whether the head before this one had a deadline."""
    return bool(head[1] & HAD_DEADLINE)


def check_layout(headers: Columns, limits: StateLimits) -> None:
    """Raise `LayoutChanged` unless all headers were written with the sizes in `limits`."""
    chunks = limits.sequence_length // limits.chunk_length
    other = headers[(headers["chunk_length"] != limits.chunk_length) | (headers["chunks"] != chunks)]
    if len(other):
        length = int(other["chunk_length"][0])
        raise LayoutChanged(
            f"state was written with sequence_length {length * int(other['chunks'][0])} and chunk_length {length}, the "
            f"settings have {limits.sequence_length} and {limits.chunk_length}: restore the old settings, or start a "
            "new application id"
        )


def seal(key: bytes, body: bytes) -> bytes:
    """Append the checksum to a value."""
    return body + crc32(body, crc32(key)).to_bytes(_CHECKSUM_BYTES, "little")


def body_of(key: bytes, value: bytes) -> bytes | None:
    """Return a value without its checksum, None unless checksum and version are right."""
    return value[:-_CHECKSUM_BYTES] if _is_whole(key, value) and value[:1] == _VERSION_BYTE else None


def unseal(key: bytes, value: bytes, *, versions: Sequence[int] = (STATE_VERSION,)) -> bytes:
    """Return a value without its checksum; raise `CorruptValue` with the reason if checksum or version is wrong."""
    if not _is_whole(key, value):
        raise CorruptValue(key, "the checksum does not match")
    if value[0] not in versions:
        raise CorruptValue(key, f"version {value[0]} is unknown, this release reads {', '.join(map(str, versions))}")
    return value[:-_CHECKSUM_BYTES]


def _is_whole(key: bytes, value: bytes) -> bool:
    """Return whether the value has a body and the right checksum."""
    body = value[:-_CHECKSUM_BYTES]
    return bool(body) and crc32(body, crc32(key)) == int.from_bytes(value[-_CHECKSUM_BYTES:], "little")


def chunk_dtype(limits: StateLimits) -> np.dtype[np.void]:
    """Return the dtype of a chunk's value without its checksum."""
    return np.dtype([*_CHUNK_HEAD.descr, ("actions", ACTION_DTYPE, (limits.chunk_length,))])


def _encode_heads(snapshot: Snapshot) -> Records:
    """Return a head record per user, cut out of one block of headers and one of tails; `seal` is inlined for speed."""
    headers, tails = snapshot.headers.tobytes(), snapshot.tails.tobytes()
    cuts = (snapshot.tail_starts * ACTION_BYTES).tolist()
    records: Records = []
    for i, user in enumerate(snapshot.users):
        key = HEAD_PREFIX + user
        body = headers[i * HEAD_BYTES : (i + 1) * HEAD_BYTES] + tails[cuts[i] : cuts[i + 1]]
        records.append((key, body + crc32(body, crc32(key)).to_bytes(_CHECKSUM_BYTES, "little")))
    for i in np.flatnonzero(snapshot.gone).tolist():
        records[i] = (records[i][0], None)
    return records


def _encode_chunks(snapshot: Snapshot, limits: StateLimits) -> Records:
    """Return the deletions, then the chunk records, cut out of one block of chunk heads and one of actions."""
    users = snapshot.users
    records: Records = [
        (CHUNK_PREFIX + users[user] + bytes((key,)), None)
        for user, key in zip(snapshot.deleted_users.tolist(), snapshot.deleted_keys.tolist(), strict=True)
    ]
    heads = np.zeros(len(snapshot.chunk_numbers), _CHUNK_HEAD)
    heads["version"], heads["chunk_length"] = STATE_VERSION, limits.chunk_length
    heads["number"] = snapshot.chunk_numbers
    head_bytes, rows = heads.tobytes(), snapshot.chunks.tobytes()
    size = limits.chunk_length * ACTION_BYTES
    numbers: Sequence[int] = snapshot.chunk_numbers.tolist()
    for i, user in enumerate(snapshot.chunk_users.tolist()):
        key = chunk_key(users[user], numbers[i], limits)
        body = head_bytes[i * _CHUNK_HEAD_BYTES : (i + 1) * _CHUNK_HEAD_BYTES] + rows[i * size : (i + 1) * size]
        records.append((key, seal(key, body)))
    return records
