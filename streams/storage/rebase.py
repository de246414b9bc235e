"""Rebase users to another source log, or to an earlier offset of theirs: sequences stay, source offsets change.

A head holds three source offsets: of the last applied event, of the newest published embedding and of the one that is
wanted. In another log they mean nothing, and after a truncation they would make new events look old. All of them are
lowered to `offset_max`, the last offset before the new position (-1 for a position of another log). A user that waits
for an embedding keeps waiting: its published offset is lowered below its applied one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streams.core.layout import HEADER_DTYPE
from streams.storage.codec import HEAD_BYTES, CorruptValue, Records, decode_head, head_key, seal, unseal

OTHER_LOG = -1
"""`offset_max` for a position in another log: no offset of the old one remains."""


def rebase(heads: Sequence[tuple[bytes, bytes]], offset_max: int) -> tuple[Records, list[bytes]]:
    """Return new head records of (user, head value), and the users whose head is corrupt and was left out."""
    users, bodies, corrupt = [], [], []
    for user, value in heads:
        try:
            decode_head(user, value)
        except CorruptValue:
            corrupt.append(user)
            continue
        users.append(user)
        bodies.append(unseal(head_key(user), value))
    headers = np.frombuffer(b"".join(body[:HEAD_BYTES] for body in bodies), HEADER_DTYPE).copy()
    is_owed = (headers["reason"] != 0) | (headers["unencoded"] > 0)
    for column in ("applied_offset", "due_offset", "encoded_offset"):
        headers[column] = np.minimum(headers[column], offset_max)
    published = np.minimum(headers["encoded_offset"], headers["applied_offset"] - 1)
    headers["encoded_offset"] = np.where(is_owed, published, headers["encoded_offset"])
    written = headers.tobytes()
    records: Records = []
    for row, (user, body) in enumerate(zip(users, bodies, strict=True)):
        key = head_key(user)
        records.append((key, seal(key, written[row * HEAD_BYTES : (row + 1) * HEAD_BYTES] + body[HEAD_BYTES:])))
    return records, corrupt
