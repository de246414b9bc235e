"""The partition of a key: murmur2, as Kafka's Java client, aiokafka, kafka-python and Faust compute it.

librdkafka does so only with `partitioner=murmur2_random`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from encoder.arrays import I64

_M, _SEED = np.uint32(0x5BD1E995), 0x9747B28C


VECTOR_MIN = 16
"""Fewer keys are hashed one by one, which is faster than forty numpy calls."""


def partitions_of(keys: Sequence[bytes], count: int) -> I64:
    """Return the partition of each key among `count`: murmur2 with its sign bit cleared, modulo `count`.

    >>> partitions_of([b"ann", b"bob", b""], 4).tolist()
    [2, 2, 1]
    """
    if len(keys) < VECTOR_MIN:
        return np.array([_murmur2(key) % count for key in keys], np.int64)
    lengths = np.fromiter(map(len, keys), np.uint32, len(keys))  # [K]
    width = (int(lengths.max(initial=0)) // 4 + 1) * 4
    padded = np.frombuffer(b"".join(key.ljust(width, b"\0") for key in keys), "<u4").reshape(len(keys), width // 4)
    hashes = np.uint32(_SEED) ^ lengths  # [K]
    blocks = lengths // 4
    for index in range(width // 4):
        mixed = padded[:, index] * _M
        mixed = (mixed ^ (mixed >> np.uint32(24))) * _M
        is_tail = (blocks == index) & (lengths % 4 > 0)  # the zero padding leaves only the 1 to 3 bytes of the tail
        tail = (hashes ^ padded[:, index]) * _M
        hashes = np.where(blocks > index, (hashes * _M) ^ mixed, np.where(is_tail, tail, hashes))
    hashes = (hashes ^ (hashes >> np.uint32(13))) * _M
    hashes ^= hashes >> np.uint32(15)
    return (hashes & np.uint32(0x7FFFFFFF)).astype(np.int64) % count


def _murmur2(key: bytes) -> int:
    """Return the hash of one key with its sign bit cleared."""
    m, mask, tail = 0x5BD1E995, 0xFFFFFFFF, len(key) & ~3
    h = _SEED ^ len(key)
    for at in range(0, tail, 4):
        k = int.from_bytes(key[at : at + 4], "little") * m & mask
        h = (h * m & mask) ^ ((k ^ (k >> 24)) * m & mask)
    if tail < len(key):
        h = (h ^ int.from_bytes(key[tail:], "little")) * m & mask
    h = (h ^ (h >> 13)) * m & mask
    return (h ^ (h >> 15)) & 0x7FFFFFFF
