"""Deletions: what a record with a null value means, and for which user.

The key of a deletion is the plain user id in UTF-8. Other encodings of the id (JSON text, a JSON object with `user_id`,
Confluent framing of either) are understood if the plain id belongs to the record's partition, because that is where the
user's state is. Everything else is rejected: a deletion that forgets the wrong user, or none, must not look
carried out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from streams.wire.partitioner import partitions_of


class UnclearDeletion(Exception):
    """Carries the reason why a deletion is rejected."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The source partition of a batch, and how many partitions there are."""

    partition: int
    partitions: int

    def holds(self, user: bytes) -> bool:
        """Return whether the user belongs to this partition."""
        return int(partitions_of([user], self.partitions)[0]) == self.partition


def check_event_type(headers: Sequence[tuple[str, bytes]], deletion_ce_type: str) -> None:
    """Raise `UnclearDeletion` for a CloudEvent without data, unless its type is the one that means a deletion.

    Any header that begins with `ce_` and has a value makes a record a CloudEvent, also one without a type.
    """
    if not any(name.startswith("ce_") and value is not None for name, value in headers):
        return
    types = [value.decode(errors="replace") for name, value in headers if name == "ce_type" and value is not None]
    found = types[-1] if types else ""
    if not found or found != deletion_ce_type:
        raise UnclearDeletion(
            f"a CloudEvent of type {found[:80]!r} without data; set decode.deletion_ce_type if it forgets the user"
        )


def plain_user(key: bytes, placement: Placement | None) -> bytes:
    """Return the user id that the key of a deletion means; raise `UnclearDeletion`."""
    inner = key[5:] if key[:1] == b"\0" and len(key) > 5 else key
    plain = _from_json(inner)
    if plain is None and inner is key and not _is_binary(key):
        return key
    if plain is None and not _is_binary(inner):
        plain = inner
    if plain is None or _is_binary(plain):
        raise UnclearDeletion("the key is no text, for example a number; send the user id as UTF-8 text")
    if placement is None or not placement.holds(plain):
        shown = plain[:80].decode(errors="replace")
        raise UnclearDeletion(
            f"the key encodes user {shown!r}, who belongs to another partition; send the user id as UTF-8 text"
        )
    return plain


def _from_json(key: bytes) -> bytes | None:
    """Return the id inside JSON text or inside the `user_id` of a JSON object, None for anything else."""
    if key[:1] not in (b'"', b"{"):
        return None
    try:
        decoded = msgspec.json.decode(key)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    user = decoded.get("user_id") if isinstance(decoded, dict) else decoded
    return user.encode() if isinstance(user, str) and user else b"\0"  # binary, so that it is rejected


def _is_binary(key: bytes) -> bool:
    return any(byte < 0x20 for byte in key)
