"""The bytes of a user's feature state: a record in the changelog and, unchanged, in RocksDB.

    record      key             value, with the bytes of each part
    features    `f`, user id    header (24), packed state, checksum (4)

The header has the version (1), flags (1: the record before this one had a refresh), 0 (2), the revision (4) and count
(8) of the sequence that the state belongs to, and the time of the next refresh (8). The packed state is that of
`streams.core.features.state.FeatureState.pack`. Numbers are little-endian, and the checksum is that of every record
(`streams.storage.codec`). A record is written together with the head of its user, and deleted with the user.

The definitions of a feature set are stored once, so that a later one can take over what both have in common:

    definitions `d`, hash (8)    version (1), JSON, checksum (4)
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence

from streams.core.features.definitions import DamagedDefinitions, FeatureSet
from streams.core.features.partition import PartitionFeatures
from streams.core.layout import Snapshot, StoredFeatures
from streams.storage.codec import CorruptValue, Records, seal, unseal
from streams.storage.store import DEFINITIONS_PREFIX, FEATURES_PREFIX, Store

VERSION = 1
HAD_REFRESH = 1
_HEADER = struct.Struct("<BBHIqq")


def features_key(user: bytes) -> bytes:
    """Return the key of a user's features."""
    return FEATURES_PREFIX + user


def encode_features(snapshot: Snapshot) -> Records:
    """Return the feature records of a snapshot, and the deletions of those of forgotten users."""
    records: Records = []
    for user, found, was_emptied in zip(
        snapshot.users, snapshot.features or [None] * len(snapshot), snapshot.emptied.tolist(), strict=True
    ):
        key = FEATURES_PREFIX + user
        if found is not None:
            records.append((key, encode_one(key, found)))
        elif was_emptied:
            records.append((key, None))
    return records


def encode_one(key: bytes, features: StoredFeatures) -> bytes:
    """Return the value of a user's features."""
    flags = HAD_REFRESH * features.had_refresh
    header = _HEADER.pack(VERSION, flags, 0, features.revision, features.count, features.refresh_ms)
    return seal(key, header + features.packed)


def decode_features(user: bytes, value: bytes) -> StoredFeatures:
    """Decode the value of a user's features; raise `CorruptValue` if it is not one."""
    key = features_key(user)
    body = unseal(key, value, versions=(VERSION,))
    if len(body) < _HEADER.size:
        raise CorruptValue(key, f"{len(value)} bytes")
    _, flags, _, revision, count, refresh_ms = _HEADER.unpack_from(body)
    return StoredFeatures(count, revision, refresh_ms, bool(flags & HAD_REFRESH), body[_HEADER.size :])


def definitions_key(version: str) -> bytes:
    """Return the key of the definitions of a feature set."""
    return DEFINITIONS_PREFIX + bytes.fromhex(version)


def missing_definitions(store: Store, features: PartitionFeatures | None) -> Records:
    """Return the record of the definitions, unless the store has it."""
    if features is None or store.get_many([key := definitions_key(features.version)]) != [None]:
        return []
    feature_set = features.config.feature_set
    return [(key, seal(key, bytes((VERSION,)) + feature_set.as_json().encode()))]


def former_definitions(store: Store, versions: Collection[str]) -> dict[str, FeatureSet | None]:
    """Return the feature sets of these versions; None for one whose definitions are missing or cannot be read."""
    found: dict[str, FeatureSet | None] = {}
    for version in versions:
        key = definitions_key(version)
        (value,) = store.get_many([key])
        try:
            found[version] = FeatureSet.from_json(unseal(key, value, versions=(VERSION,))[1:]) if value else None
        except (CorruptValue, DamagedDefinitions):
            found[version] = None
    return found


def read_features(
    store: Store, users: Sequence[bytes], corrupt: dict[bytes, CorruptValue]
) -> list[StoredFeatures | None]:
    """Read the features of users, None for one without; a corrupt one is added to `corrupt`, as by `read_users`."""
    found: list[StoredFeatures | None] = []
    for user, value in zip(users, store.get_many([features_key(user) for user in users]), strict=True):
        try:
            found.append(None if value is None else decode_features(user, value))
        except CorruptValue as error:
            corrupt.setdefault(user, error)
            found.append(None)
    return found
