"""Records that are no actions, or that only look strange: one list of kinds, from which a workload draws.

Every reason for which a record is rejected is among them, and so are valid records with odd headers and deletions with
encoded keys. Which of them are rejected, and why, is up to the model.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from infra.harness.events import partition_of

NESTED = 20_000
"""Depth at which every parser of JSON gives up."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to send; a partition of None means the one of its key."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    partition: int | None = None
    raw_header: bytes = b""
    """Name of a header in bytes that no client library would send."""


Kind = Callable[["Template", random.Random], Outgoing]


@dataclass(frozen=True, slots=True)
class Template:
    """A valid action that is about to be spoiled."""

    key: bytes
    value: bytes
    event: Mapping[str, Any]
    partitions: int

    @property
    def elsewhere(self) -> int:
        """A partition that is not the one of the user."""
        return (partition_of(self.key, self.partitions) + 1) % self.partitions

    def with_fields(self, **fields: Any) -> bytes:
        """Return the action with other or more fields."""
        return json.dumps({**self.event, **fields}).encode()


def poison(key: bytes, value: bytes, partitions: int, rng: random.Random) -> Outgoing:
    """Return a strange record made from a valid action, of a kind drawn at random."""
    return rng.choice(KINDS)(Template(key, value, json.loads(value), partitions), rng)


def damaged(template: Template, rng: random.Random) -> Outgoing:
    """Cut, overwrite, double or prefix the value, as a broken producer or disk does."""
    value, at = template.value, rng.randrange(1, len(template.value))
    values = (
        value[:at],
        value[:at] + b"\x01" * min(8, len(value) - at) + value[at + 8 :],
        value + value,
        b"\xef\xbb\xbf" + value,
        value.decode().encode("utf-16-le"),
        template.with_fields(more=0)[:-2] + b"[" * NESTED + b"]" * NESTED + b"}",
    )
    return Outgoing(template.key, rng.choice(values))


def encoded_deletion(template: Template, rng: random.Random) -> Outgoing:
    """Delete the user under another form of its id, in the partition of that form or in the user's own."""
    user = template.key.decode()
    keys = (
        json.dumps(user).encode(),
        json.dumps({"user_id": user}).encode(),
        b"\0\0\0\0\5" + json.dumps(user).encode(),
        b"\0\0\0\0\5" + template.key,
        json.dumps({"id": 7}).encode(),
        struct.pack(">q", 1_234_567),
    )
    partition = rng.choice((None, partition_of(template.key, template.partitions), template.elsewhere))
    return Outgoing(rng.choice(keys), None, partition=partition)


def _fields(**fields: Any) -> Kind:
    return lambda template, _: Outgoing(template.key, template.with_fields(**fields))


def _value(value: bytes) -> Kind:
    return lambda template, _: Outgoing(template.key, value)


def _headers(*headers: tuple[str, bytes]) -> Kind:
    return lambda template, _: Outgoing(template.key, template.value, headers)


CLOUD_EVENT = (("ce_specversion", b"1.0"), ("ce_id", b"7"), ("ce_source", b"/shop"), ("ce_type", b"session.started"))
FORGED = (("error-reason", b"none"), ("source-offset", b"1"), ("source-topic", b"other"), ("source-partition", b"9"))
"""Headers that a dead letter has, sent by a producer."""

KINDS: tuple[Kind, ...] = (
    lambda one, _: Outgoing(None, one.value),
    lambda one, _: Outgoing(b"\xff\xfe", None),
    lambda one, _: Outgoing(b"another-user", one.value),
    lambda one, _: Outgoing(one.key, one.value.replace(b'"item-', b'"\xff')),
    lambda one, _: Outgoing(
        one.key, json.dumps({name: one.event[name] for name in one.event if name != "item_id"}).encode()
    ),
    _value(b""),
    _value(b"[]"),
    _value(b"null"),
    _value(b"\0\0\0\0\1"),
    _fields(timestamp_ms=float("nan")),
    _fields(timestamp_ms=1_700_000_000),
    _fields(timestamp_ms=0),
    _fields(timestamp_ms=2**53),
    _fields(timestamp_ms="now"),
    _fields(item_id=""),
    _fields(item_id="x" * 300),
    _fields(item_id=None),
    _fields(duration_ms=-1),
    _fields(duration_ms=2**40),
    _fields(user_id=7),
    _fields(value="7.50"),
    _fields(value=True),
    _fields(value=float("inf")),
    damaged,
    damaged,
    lambda one, _: Outgoing(one.key, one.value, partition=one.elsewhere),
    lambda one, _: Outgoing(one.key, None, partition=one.elsewhere),
    encoded_deletion,
    lambda one, _: Outgoing(one.key, None, CLOUD_EVENT),
    _headers(("", b"empty"), ("ü" * 200, b""), ("twice", b"1"), ("twice", b"2")),
    lambda one, _: Outgoing(one.key, one.value[:-1], (("", b"empty"), *FORGED)),
    _headers(*FORGED),
    lambda one, _: Outgoing(one.key, one.value, raw_header=b"\xff\xfe"),
    lambda one, _: Outgoing(one.key, one.value[:-1], raw_header=b"\xc3\x28"),
)
