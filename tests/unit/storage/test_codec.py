"""The codec: every value decodes to what was encoded, also of old versions, and an altered value is detected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoder.actions.columns import ACTION_DTYPE
from streams.core.columns import starts_of as starts
from streams.core.layout import HEADER_DTYPE, Snapshot, StateLimits
from streams.storage.codec import (
    MARK_KEY,
    CheckpointMark,
    CorruptValue,
    LayoutChanged,
    check_layout,
    chunk_key,
    deadline_of,
    decode_chunk,
    decode_head,
    decode_mark,
    encode,
    encode_mark,
    had_deadline,
    head_key,
    seal,
)
from streams.storage.identity import Identity, LastRecord

LIMITS = StateLimits(sequence_length=8, chunk_length=2)
USER = "käthe".encode()
FULL_IDENTITY = Identity("cluster", "actions", "id-1", "id-2", "8 in 2", "f")
FULL_MARK = CheckpointMark(3, 4, FULL_IDENTITY, 2, "adopt", ("a", "b"), LastRecord(2, 2**32 - 1))


def _random(dtype: np.dtype[np.void], count: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    return np.frombuffer(np.random.default_rng(seed).bytes(dtype.itemsize * count), dtype).copy()


def _snapshot(users: list[bytes], tails: list[int], chunks: list[tuple[int, int]], seed: int = 0) -> Snapshot:
    """Return random headers and actions: `tails` actions per user, `chunks` as (user index, number)."""
    headers = _random(HEADER_DTYPE, len(users), seed)
    headers["version"], headers["tail"] = 1, tails
    none = np.zeros(0, np.int64)
    return Snapshot(
        users=users,
        headers=headers,
        tails=_random(ACTION_DTYPE, sum(tails), seed + 1),
        tail_starts=starts(np.array(tails, np.int64)),
        chunk_users=np.array([user for user, _ in chunks], np.int64),
        chunk_numbers=np.array([number for _, number in chunks], np.int64),
        chunks=_random(ACTION_DTYPE, 2 * len(chunks), seed + 2).reshape(-1, 2),
        deleted_users=none,
        deleted_keys=none,
        dirty_from=none,
        stored_keys=none,
        emptied=np.zeros(0, np.bool_),
        gone=np.zeros(len(users), np.bool_),
    )


USERS = st.lists(st.binary(max_size=40), min_size=1, max_size=6, unique=True)


@given(users=USERS, data=st.data(), seed=st.integers(0, 2**31))
def test_decoding_inverts_encoding(users: list[bytes], data: st.DataObject, seed: int) -> None:
    """Every header, tail and chunk decodes to what was encoded, for every user id."""
    tails = data.draw(st.lists(st.integers(0, 1), min_size=len(users), max_size=len(users)))
    chunks = [(user, data.draw(st.integers(0, 2**40))) for user in range(len(users))]
    snapshot = _snapshot(users, tails, chunks, seed)
    records = dict(encode(snapshot, LIMITS))
    assert len(records) == 2 * len(users)
    for row, user in enumerate(users):
        value = records[head_key(user)]
        assert value is not None
        header, tail = decode_head(user, value)
        assert header.tobytes() == snapshot.headers[row : row + 1].tobytes()
        assert tail.tobytes() == snapshot.tails[snapshot.tail_starts[row] : snapshot.tail_starts[row + 1]].tobytes()
        assert deadline_of(value) == header["due_ms"][0]
        assert had_deadline(value) == bool(header["flags"][0] & 1)
        number = chunks[row][1]
        chunk = decode_chunk(user, number, records[chunk_key(user, number, LIMITS)], LIMITS)
        assert chunk.tobytes() == snapshot.chunks[row].tobytes()


def test_every_flipped_bit_is_detected() -> None:
    """A head, chunk or mark with any single bit flipped is rejected."""
    snapshot = _snapshot([USER], [1], [(0, 5)])
    (_, chunk), (_, head) = encode(snapshot, LIMITS)
    assert head is not None
    assert chunk is not None
    mark = encode_mark(FULL_MARK)[1]
    for value, decode in (
        (head, lambda value: decode_head(USER, value)),
        (chunk, lambda value: decode_chunk(USER, 5, value, LIMITS)),
        (mark, decode_mark),
    ):
        decode(value)
        for bit in range(len(value) * 8):
            flipped = bytearray(value)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(CorruptValue):
                decode(bytes(flipped))


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 83, 84, 100, 115, 117])
def test_cut_or_padded_value_is_rejected(length: int) -> None:
    """A value whose length differs from that in its header is corrupt, even with a right checksum."""
    (_, head) = encode(_snapshot([USER], [1], []), LIMITS)[0]
    assert head is not None
    assert len(head) == 116
    body = (head[:-4] + b"\x00" * 8)[: max(length - 4, 0)]
    with pytest.raises(CorruptValue):
        decode_head(USER, seal(head_key(USER), body) if length >= 4 else b"\x00" * length)


def test_value_of_another_user_is_rejected() -> None:
    """A value stored under the key of another user is corrupt."""
    (_, head) = encode(_snapshot([USER], [0], []), LIMITS)[0]
    assert head is not None
    with pytest.raises(CorruptValue, match="checksum"):
        decode_head(b"other", head)


def test_another_chunk_under_the_same_key_is_rejected() -> None:
    """Chunk keys repeat; a chunk of an earlier or later round is not accepted for the requested one."""
    (_, chunk), _ = encode(_snapshot([USER], [0], [(0, 5)]), LIMITS)
    assert chunk_key(USER, 5, LIMITS) == chunk_key(USER, 5 + LIMITS.chunk_keys, LIMITS)
    with pytest.raises(CorruptValue, match="holds chunk 5 instead of 10"):
        decode_chunk(USER, 5 + LIMITS.chunk_keys, chunk, LIMITS)
    with pytest.raises(CorruptValue, match="missing"):
        decode_chunk(USER, 5, None, LIMITS)


def test_unknown_version_is_rejected() -> None:
    """A value of an unknown version is rejected, not guessed at."""
    body = b"\x02" + bytes(79)
    with pytest.raises(CorruptValue, match="version 2 is unknown"):
        decode_head(USER, seal(head_key(USER), body))


def test_state_of_other_sizes_is_rejected() -> None:
    """State written with another sequence or chunk length raises an error that names both sizes."""
    headers = _random(HEADER_DTYPE, 1, 0)
    headers["chunk_length"], headers["chunks"] = 16, 16
    with pytest.raises(LayoutChanged, match="sequence_length 256 and chunk_length 16, the settings have 8 and 2"):
        check_layout(headers, LIMITS)


GOLDEN_HEAD = (
    "01010301040000000500000000000000ee03000000000000ed03000000000000ee03000000000000a4060000000000000807"
    "0000000000006c070000000000009e0700000000000002000000020004000b000000000000000c000d000e00000000000000"
    "0f000000100000000000000097846444"
)
GOLDEN_CHUNK = (
    "0100020001000000000000001500000000000000160017001800000000000000190000001a000000000000001f0000000000"
    "0000200021002200000000000000230000002400000000000000eda85258"
)
GOLDEN_MARK = "01ef03000000000000d307000000000000f421c343"


def test_version_1_still_decodes() -> None:
    """Bytes that the first release wrote are decoded, field by field."""
    header, tail = decode_head(b"u1", bytes.fromhex(GOLDEN_HEAD))
    expected = (1, 1, 3, 1, 4, 5, 1006, 1005, 1006, 1700, 1800, 1900, 1950, 2, 2, 4)
    assert header.tolist() == [expected]
    assert tail.tolist() == [(11, 12, 13, 14, 15, 16)]
    chunk = decode_chunk(b"u1", 1, bytes.fromhex(GOLDEN_CHUNK), LIMITS)
    assert chunk.tolist() == [(21, 22, 23, 24, 25, 26), (31, 32, 33, 34, 35, 36)]
    assert decode_mark(bytes.fromhex(GOLDEN_MARK)) == CheckpointMark(1_007, 2_003)


def test_marks_keep_their_identity() -> None:
    """A mark of version 2 is read back with identity, life, unfinished command, operations and last record."""
    assert decode_mark(encode_mark(FULL_MARK)[1]) == FULL_MARK
    assert decode_mark(encode_mark(CheckpointMark(3, 4))[1]) == CheckpointMark(3, 4)
    assert decode_mark(encode_mark(replace(FULL_MARK, last=None))[1]) == replace(FULL_MARK, last=None)


def test_a_mark_of_a_later_release_is_read_as_far_as_it_is_known() -> None:
    """Details that a later release has added do not make its mark unreadable; those it does not have are unknown."""
    details = b'{"identity": {"cluster_id": "c", "new": "x"}, "newer": [1]}'
    mark = decode_mark(seal(MARK_KEY, encode_mark(CheckpointMark(3, 4))[1][:17] + details))
    assert mark == CheckpointMark(3, 4, Identity("c", "", "", "", ""))


@pytest.mark.parametrize(
    "details", [b"", b"{", b"[]", b'{"identity": 5}', b'{"operations": 5}', b'{"life": "x"}', b'{"last": [1]}']
)
def test_unreadable_details_are_corrupt(details: bytes) -> None:
    """A mark of version 2 whose checksum is right and whose details are not JSON of the right shape is corrupt."""
    with pytest.raises(CorruptValue, match="details"):
        decode_mark(seal(MARK_KEY, encode_mark(CheckpointMark(3, 4))[1][:17] + details))
