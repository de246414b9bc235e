"""Reading the headers, the key and the tombstones that records of all output topics have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from streams.errors import StreamformerError

Headers = Sequence[tuple[str, bytes]]
Message = tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]
"""Key, value and headers of a record to be produced."""
INTEGER_DIGITS_MAX = 19


@dataclass(frozen=True, slots=True)
class Tombstone:
    """A forgotten user; `source_offset` is that of the deletion, -1 if the record does not state it."""

    user: str
    source_offset: int
    source_id: str = ""
    """Identity of the log that the source offset belongs to; empty in records of before it was written."""


@dataclass(frozen=True, slots=True)
class HeaderTexts:
    """The headers of one record as text; what is missing or unreadable raises `malformed`."""

    texts: dict[str, str]
    malformed: type[StreamformerError]

    @classmethod
    def of(cls, headers: Headers, malformed: type[StreamformerError]) -> Self:
        """Decode headers; of two with one name the last counts."""
        try:
            return cls({name: value.decode() for name, value in headers if value is not None}, malformed)
        except UnicodeDecodeError:
            raise malformed("a header is not UTF-8") from None

    def text(self, name: str) -> str:
        """Return a header that must be there."""
        if name not in self.texts:
            raise self.malformed(f"header {name} is missing")
        return self.texts[name]

    def integer(self, name: str) -> int:
        """Return a header that must be there and an integer."""
        text = self.text(name)
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) <= INTEGER_DIGITS_MAX):
            raise self.malformed(f"header {name} is {text[:40]!r}, not an integer")
        return int(text)

    @property
    def source_id(self) -> str:
        """Identity of the source log, empty if the record does not state it."""
        return self.texts.get("source-id", "")

    def tombstone(self, user: str) -> Tombstone:
        """Return the tombstone of `user` that has these headers."""
        offset = self.integer("source-offset") if "source-offset" in self.texts else -1
        return Tombstone(user, offset, self.source_id)


def source_headers(source_id: str) -> list[tuple[str, bytes]]:
    """Return the header that names the source log; none if it is unknown."""
    return [("source-id", source_id.encode())] if source_id else []


def encode_tombstone(user: bytes, source_offset: int, source_id: str = "") -> Message:
    """Return the message that forgets `user`, whose deletion was read at `source_offset`."""
    return user, None, [("source-offset", b"%d" % source_offset), *source_headers(source_id)]


def user_of(key: bytes | None, malformed: type[StreamformerError]) -> str:
    """Return the user that a key names; raise `malformed` if it is not UTF-8."""
    try:
        return (key or b"").decode()
    except UnicodeDecodeError:
        raise malformed("the key is not UTF-8") from None
