"""Encoding and decoding of embeddings and their headers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from streams.wire.embeddings import (
    Embedding,
    EmbeddingBatch,
    EmbeddingCodec,
    EmbeddingMetadata,
    MalformedEmbedding,
    Tombstone,
    Vector,
    decode_embedding,
    decode_metadata,
    encode_embeddings,
    encode_tombstone,
)


def batch_of(vectors: Vector) -> EmbeddingBatch:
    """Return a batch with distinct metadata per row."""
    count = len(vectors)
    return EmbeddingBatch(
        users=[f"user-{row}".encode() for row in range(count)],
        vectors=vectors,
        event_times_ms=np.arange(count) + 1_700_000_000_000,
        sequence_lengths=np.arange(count) % 256 + 1,
        reasons=["every_n", "strong"] * (count // 2) + ["every_n"] * (count % 2),
        source_offsets=np.arange(count) + 2**40,
        encoder_version="v7",
        encoded_at_ms=1_700_000_000_123,
    )


ONE = batch_of(np.array([[0.5, -1.25, 3.0]], np.float32))


def record_of(codec: EmbeddingCodec, **changed: bytes | None) -> tuple[bytes, bytes | None, list[tuple[str, bytes]]]:
    """Return the first record of `ONE`, with headers replaced, or removed where None is given."""
    [(key, value, headers)] = encode_embeddings(ONE, codec)
    named = dict[str, bytes | None](headers) | {name.replace("_", "-"): text for name, text in changed.items()}
    return key, value, [(name, text) for name, text in named.items() if text is not None]


def test_all_metadata_is_in_headers() -> None:
    """The headers are those of the contract, in its order, as text; the value is only the vector, little-endian."""
    [(key, value, headers)] = encode_embeddings(ONE, EmbeddingCodec.FLOAT32)
    assert key == b"user-0"
    assert value == bytes.fromhex("0000003f0000a0bf00004040")
    assert headers == [
        ("encoder-version", b"v7"),
        ("dim", b"3"),
        ("dtype", b"float32"),
        ("event-time-ms", b"1700000000000"),
        ("sequence-length", b"1"),
        ("reason", b"every_n"),
        ("source-offset", b"1099511627776"),
        ("encoded-at-ms", b"1700000000123"),
    ]


def test_float16_and_json() -> None:
    """A float16 value has two bytes per number, little-endian; a JSON value is an array that any parser accepts."""
    assert record_of(EmbeddingCodec.FLOAT16)[1] == bytes.fromhex("003800bd0042")
    assert json.loads(record_of(EmbeddingCodec.JSON)[1] or b"") == [0.5, -1.25, 3.0]


@pytest.mark.parametrize("codec", EmbeddingCodec)
@settings(max_examples=60)
@given(
    vectors=hnp.arrays(
        np.float32, st.tuples(st.integers(0, 5), st.integers(1, 9)), elements=st.floats(-6e4, 6e4, width=32)
    )
)
def test_decoding_inverts_encoding(codec: EmbeddingCodec, vectors: Vector) -> None:
    """Every embedding decodes to what was encoded: exactly in float32 and JSON, rounded once in float16."""
    batch = batch_of(vectors)
    read = [decode_embedding(*message) for message in encode_embeddings(batch, codec)]
    expected = vectors.astype(np.float16).astype(np.float32) if codec is EmbeddingCodec.FLOAT16 else vectors
    assert len(read) == len(batch)
    for row, embedding in enumerate(read):
        assert isinstance(embedding, Embedding)
        assert embedding.user == f"user-{row}"
        assert embedding.vector.dtype == np.float32
        np.testing.assert_array_equal(embedding.vector, expected[row])
        assert embedding.metadata == EmbeddingMetadata(
            encoder_version="v7",
            dim=vectors.shape[1],
            dtype=codec,
            event_time_ms=int(batch.event_times_ms[row]),
            sequence_length=int(batch.sequence_lengths[row]),
            reason=batch.reasons[row],
            source_offset=int(batch.source_offsets[row]),
            encoded_at_ms=1_700_000_000_123,
        )


def test_a_null_value_is_a_tombstone() -> None:
    """A tombstone decodes to its user and the offset of the deletion, -1 if another producer wrote none."""
    assert decode_embedding(*encode_tombstone(b"ann", 41)) == Tombstone("ann", 41)
    assert decode_embedding(b"ann", None, []) == Tombstone("ann", -1)


def test_metadata_can_be_decoded_alone() -> None:
    """The metadata of an embedding can be decoded without its vector."""
    assert decode_metadata(record_of(EmbeddingCodec.FLOAT16)[2]).source_offset == 2**40


@pytest.mark.parametrize("codec", EmbeddingCodec)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_rejected(codec: EmbeddingCodec, number: float) -> None:
    """A NaN or an infinity is rejected before any message of its batch, and the error text has the count."""
    vectors = np.ones((3, 2), np.float32)
    vectors[1, 1] = number
    with pytest.raises(MalformedEmbedding, match="1 of 3"):
        encode_embeddings(batch_of(vectors), codec)


def test_a_number_too_large_for_float16_is_rejected() -> None:
    """A number that overflows in float16 is rejected there, and accepted in float32."""
    vectors = np.full((1, 2), 7e4, np.float32)
    with pytest.raises(MalformedEmbedding, match="float16"):
        encode_embeddings(batch_of(vectors), EmbeddingCodec.FLOAT16)
    assert len(list(encode_embeddings(batch_of(vectors), EmbeddingCodec.FLOAT32))) == 1


MALFORMED = {
    "one number short": (b"\0" * 8, {}, "has 2 numbers, but header dim is 3"),
    "half a number": (b"\0" * 11, {}, "11 bytes"),
    "another dim": (b"\0" * 12, {"dim": b"4"}, "dim is 4"),
    "NaN": (np.full(3, np.nan, "<f4").tobytes(), {}, "not finite"),
    "unknown dtype": (b"\0" * 12, {"dtype": b"bfloat16"}, "bfloat16"),
    "no dtype": (b"\0" * 12, {"dtype": None}, "header dtype is missing"),
    "no version": (b"\0" * 12, {"encoder_version": None}, "header encoder-version is missing"),
    "no offset": (b"\0" * 12, {"source_offset": None}, "header source-offset is missing"),
    "offset a word": (b"\0" * 12, {"source_offset": b"many"}, "not an integer"),
    "offset too long": (b"\0" * 12, {"source_offset": b"9" * 5_000}, "not an integer"),
    "header not UTF-8": (b"\0" * 12, {"reason": b"\xff"}, "not UTF-8"),
    "JSON cut": (b"[1,2", {"dtype": b"json"}, "not a JSON array"),
    "JSON of words": (b'["a"]', {"dtype": b"json"}, "not a JSON array"),
    "JSON overflow": (b"[1e39,1,1]", {"dtype": b"json"}, "not finite"),
}


@pytest.mark.parametrize(("value", "changed", "text"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_record_raises(value: bytes, changed: dict[str, bytes | None], text: str) -> None:
    """Each malformed record raises an error that names the problem."""
    key, _, headers = record_of(EmbeddingCodec.FLOAT32, **changed)
    with pytest.raises(MalformedEmbedding, match=text):
        decode_embedding(key, value, headers)


def test_a_key_that_is_not_text_is_malformed() -> None:
    """A key that is not UTF-8 raises an error that names the key."""
    _, value, headers = record_of(EmbeddingCodec.FLOAT32)
    with pytest.raises(MalformedEmbedding, match="key"):
        decode_embedding(b"\xff", value, headers)


def test_a_read_vector_cannot_be_changed() -> None:
    """The vector of a decoded embedding is read-only."""
    embedding = decode_embedding(*record_of(EmbeddingCodec.FLOAT32))
    assert isinstance(embedding, Embedding)
    with pytest.raises(ValueError, match="read-only"):
        embedding.vector[0] = 1
