"""Dead letters: a rejected record is forwarded unchanged, with five more headers: the reason and its origin.

The headers follow the spirit of KIP-1034: `error-reason` and `error-detail`, then `source-topic`, `source-partition`
and `source-offset`, all UTF-8 text. Key, value and the record's own headers are unchanged. A dead letter that was sent
to the source topic again and rejected again has each header twice; read the last one.
"""

from __future__ import annotations

from streams.wire.actions import Headers, Record, Rejected

DETAIL_CHARS_MAX = 500
ERROR_HEADERS = "error-reason", "error-detail", "source-topic", "source-partition", "source-offset"
"""Names of the added headers."""


def dead_letter_headers(rejected: Rejected, record: Record, *, topic: str, partition: int) -> list[tuple[str, bytes]]:
    """Return the headers of the dead letter of `record`, which was read from `topic` and `partition`."""
    return error_headers(
        record.headers,
        reason=rejected.reason,
        detail=rejected.detail,
        topic=topic,
        partition=partition,
        offset=record.offset,
    )


def error_headers(
    received: Headers, *, reason: str, detail: str, topic: str, partition: int, offset: int
) -> list[tuple[str, bytes]]:
    """Return the headers `received`, then the five; also for users that the encoder rejects after decoding."""
    return [
        *received,
        ("error-reason", reason.encode()),
        ("error-detail", detail[:DETAIL_CHARS_MAX].encode(errors="replace")),
        ("source-topic", topic.encode()),
        ("source-partition", b"%d" % partition),
        ("source-offset", b"%d" % offset),
    ]
