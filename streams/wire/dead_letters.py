"""Dead letters: a rejected record goes on as it came, with five more headers that say why and where it came from.

Names and values follow KIP-1034 in spirit: `error-reason` and `error-detail`, then `source-topic`, `source-partition`
and `source-offset`, all UTF-8 text. Key, value and the record's own headers are left untouched; a consumer that finds
a header twice (a dead letter that was fed back and rejected again) reads the last one.
"""

from __future__ import annotations

from streams.wire.actions import Headers, Record, Rejected

DETAIL_CHARS_MAX = 500


def dead_letter_headers(rejected: Rejected, record: Record, *, topic: str, partition: int) -> list[tuple[str, bytes]]:
    """The headers of the dead letter of `record`, which was read from `topic` and `partition`."""
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
    """`received` and behind it the five headers; for what is rejected after decoding, by the encoder for example."""
    return [
        *received,
        ("error-reason", reason.encode()),
        ("error-detail", detail[:DETAIL_CHARS_MAX].encode(errors="replace")),
        ("source-topic", topic.encode()),
        ("source-partition", b"%d" % partition),
        ("source-offset", b"%d" % offset),
    ]
