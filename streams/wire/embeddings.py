"""Embeddings on the output topic: columns to records, and a record back to an embedding.

The key is the user id in UTF-8. The value is the vector, by codec: little-endian float32 or float16, or a JSON array of
numbers. The metadata is in headers of UTF-8 text, the same for every codec: `encoder-version`, `dim`, `dtype` (the
codec's name), `event-time-ms` (of the newest action inside), `sequence-length`, `reason`, `source-offset` (of the
newest event inside), `encoded-at-ms` (processing time), `source-id` (which log that offset belongs to; missing where
unknown). A null value is a tombstone, which means that the user is forgotten; its headers are `source-offset` and
`source-id`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec
import numpy as np

from encoder.arrays import F32, I64
from streams.errors import StreamformerError
from streams.wire.headers import Headers, HeaderTexts, Message, Tombstone, encode_tombstone, source_headers, user_of

__all__ = [
    "Embedding",
    "EmbeddingBatch",
    "EmbeddingCodec",
    "EmbeddingMetadata",
    "Headers",
    "MalformedEmbedding",
    "Message",
    "Tombstone",
    "Vector",
    "decode_embedding",
    "decode_metadata",
    "encode_embeddings",
    "encode_tombstone",
    "largest_embedding",
]

Vector = F32


class EmbeddingCodec(StrEnum):
    """The encodings of a vector."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    JSON = "json"


_CODECS = {codec.value: codec for codec in EmbeddingCodec}


class MalformedEmbedding(StreamformerError):
    """A record, or a vector to be written, is not a valid embedding; the text states why."""


@dataclass(frozen=True, slots=True)
class EmbeddingBatch:
    """The embeddings of U users by one encoder, as columns."""

    users: Sequence[bytes]
    """User ids, UTF-8; length U."""
    vectors: F32
    """[U, dim]."""
    event_times_ms: I64
    """[U], event time of the newest action inside."""
    sequence_lengths: I64
    """[U], number of actions inside."""
    reasons: Sequence[str]
    """[U], labels of the reasons for which the users were due."""
    source_offsets: I64
    """[U], source offset of the newest event inside."""
    encoder_version: str
    encoded_at_ms: int
    """Processing time at which the batch was encoded."""
    source_id: str = ""
    """Identity of the log that the source offsets belong to; empty if unknown."""

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True, slots=True)
class EmbeddingMetadata:
    """The headers of one embedding."""

    encoder_version: str
    dim: int
    dtype: EmbeddingCodec
    event_time_ms: int
    sequence_length: int
    reason: str
    source_offset: int
    encoded_at_ms: int
    source_id: str = ""
    """Identity of the log that the source offset belongs to; empty in records of before it was written."""


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """An embedding that was read; `vector` is [dim] float32 for every codec, and read-only."""

    user: str
    vector: Vector
    metadata: EmbeddingMetadata


def encode_embeddings(batch: EmbeddingBatch, codec: EmbeddingCodec) -> Iterator[Message]:
    """Return one message per user, in order; raise `MalformedEmbedding` before the first if a number is not finite."""
    values = _values(batch.vectors, codec)
    version = ("encoder-version", batch.encoder_version.encode())
    dim = ("dim", b"%d" % batch.vectors.shape[1])
    dtype = ("dtype", codec.value.encode())
    encoded_at = ("encoded-at-ms", b"%d" % batch.encoded_at_ms)
    source = source_headers(batch.source_id)
    columns = zip(
        batch.users,
        values,
        batch.event_times_ms.tolist(),
        batch.sequence_lengths.tolist(),
        batch.reasons,
        batch.source_offsets.tolist(),
        strict=True,
    )
    return (
        (
            user,
            value,
            [
                version,
                dim,
                dtype,
                ("event-time-ms", b"%d" % event_time_ms),
                ("sequence-length", b"%d" % length),
                ("reason", reason.encode()),
                ("source-offset", b"%d" % source_offset),
                encoded_at,
                *source,
            ],
        )
        for user, value, event_time_ms, length, reason, source_offset in columns
    )


def largest_embedding(id_bytes: int, dim: int, encoder_version: str, codec: EmbeddingCodec) -> Message:
    """Return the largest message that an embedding can have, so that topics can be checked before work begins."""
    longest = np.full((1, dim), -1.1754944e-38, np.float32)  # as long as any number in JSON
    number = np.array([2**62])
    batch = EmbeddingBatch(
        users=[bytes(id_bytes)],
        vectors=longest,
        event_times_ms=number,
        sequence_lengths=number,
        reasons=["max_staleness"],
        source_offsets=number,
        encoder_version=encoder_version,
        encoded_at_ms=2**62,
    )
    (message,) = encode_embeddings(batch, codec)
    return message


def decode_embedding(key: bytes | None, value: bytes | None, headers: Headers) -> Embedding | Tombstone:
    """Decode one record of the output topic; raise `MalformedEmbedding` if it is not an embedding or a tombstone."""
    texts = HeaderTexts.of(headers, MalformedEmbedding)
    user = user_of(key, MalformedEmbedding)
    if value is None:
        return texts.tombstone(user)
    metadata = _metadata(texts)
    vector = _vector(value, metadata.dtype)
    if vector.shape != (metadata.dim,):
        raise MalformedEmbedding(f"the value has {vector.size} numbers, but header dim is {metadata.dim}")
    if not np.isfinite(vector).all():
        raise MalformedEmbedding("the vector contains a number that is not finite")
    vector.flags.writeable = False
    return Embedding(user, vector, metadata)


def decode_metadata(headers: Headers) -> EmbeddingMetadata:
    """Decode only the headers; raise `MalformedEmbedding` if one is missing or unreadable."""
    return _metadata(HeaderTexts.of(headers, MalformedEmbedding))


def _values(vectors: F32, codec: EmbeddingCodec) -> Iterator[bytes]:
    with np.errstate(over="ignore"):
        written = vectors.astype("<f2" if codec is EmbeddingCodec.FLOAT16 else "<f4")
    if not np.isfinite(written).all():
        rows = int((~np.isfinite(written).all(axis=1)).sum())
        raise MalformedEmbedding(f"{rows} of {len(vectors)} vectors contain a number that is not finite in {codec}")
    if codec is EmbeddingCodec.JSON:
        return (_json(row) for row in written)
    raw = written.tobytes()
    row_bytes = written.shape[1] * written.itemsize
    return (raw[start : start + row_bytes] for start in range(0, len(raw), row_bytes or 1))


def _json(vector: Vector) -> bytes:
    """Return the shortest decimals that decode to the same float32."""
    return b"[" + ",".join(vector.astype(str).tolist()).encode() + b"]"


def _vector(value: bytes, codec: EmbeddingCodec) -> Vector:
    if codec is EmbeddingCodec.JSON:
        try:
            with np.errstate(over="ignore"):
                return np.array(msgspec.json.decode(value, type=list[float]), np.float32)
        except (msgspec.DecodeError, UnicodeDecodeError, OverflowError) as error:
            raise MalformedEmbedding(f"the value is not a JSON array of numbers: {error}") from None
    dtype = np.dtype("<f2" if codec is EmbeddingCodec.FLOAT16 else "<f4")
    if len(value) % dtype.itemsize:
        raise MalformedEmbedding(
            f"the value has {len(value)} bytes, not a multiple of {dtype.itemsize}, the size of a {codec}"
        )
    return np.frombuffer(value, dtype).astype(np.float32)


def _metadata(texts: HeaderTexts) -> EmbeddingMetadata:
    dtype = texts.text("dtype")
    if dtype not in _CODECS:
        raise MalformedEmbedding(f"header dtype is {dtype[:40]!r}, not one of {', '.join(_CODECS)}")
    return EmbeddingMetadata(
        encoder_version=texts.text("encoder-version"),
        dim=texts.integer("dim"),
        dtype=_CODECS[dtype],
        event_time_ms=texts.integer("event-time-ms"),
        sequence_length=texts.integer("sequence-length"),
        reason=texts.text("reason"),
        source_offset=texts.integer("source-offset"),
        encoded_at_ms=texts.integer("encoded-at-ms"),
        source_id=texts.source_id,
    )
