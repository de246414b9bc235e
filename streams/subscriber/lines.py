"""Changes as text: lines for people, and a line of JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.text import Text

from streams.wire.embeddings import Embedding
from streams.wire.features import UserFeatures
from streams.wire.headers import Tombstone

NUMBERS_SHOWN = 4
"""Numbers of a vector that a line shows."""
AnyChange = Embedding | UserFeatures | Tombstone


def as_json(change: AnyChange) -> str:
    """Return one line of JSON: the vector or the values with their metadata, or the tombstone."""
    if isinstance(change, Tombstone):
        return json.dumps({"user": change.user, "tombstone": True, "source_offset": change.source_offset})
    metadata = asdict(change.metadata)
    del metadata["source_id"]
    if isinstance(change, UserFeatures):
        return json.dumps({"user": change.user, **metadata, "values": change.values})
    del metadata["dim"], metadata["dtype"]
    numbers = [float(text) for text in change.vector.astype(str)]  # as short as float32 allows
    return json.dumps({"user": change.user, **metadata, "vector": numbers})


def lines_of(change: AnyChange) -> Iterator[Text]:
    """Yield lines for people; unprintable characters of ids and names are escaped."""
    user = (_printable(change.user), "bold")
    if isinstance(change, Tombstone):
        yield Text.assemble(user, "  ", ("forgotten", "red"), f"  offset {change.source_offset}")
    elif isinstance(change, UserFeatures):
        yield from _table(change)
    else:
        metadata = change.metadata
        numbers = " ".join(f"{number:+.3f}" for number in change.vector[:NUMBERS_SHOWN].tolist())
        more = " …" if len(change.vector) > NUMBERS_SHOWN else ""
        yield Text.assemble(
            (_time(metadata.encoded_at_ms), "dim"),
            "  ",
            user,
            f"  {metadata.reason}  {metadata.sequence_length} actions  {metadata.encoder_version}  ",
            (f"[{numbers}{more}]", "cyan"),
        )


def _table(features: UserFeatures) -> Iterator[Text]:
    """Yield a line with the metadata, then one per feature."""
    metadata = features.metadata
    until_ms = metadata.valid_until_ms
    until = "" if until_ms is None else f"  valid until {_time(until_ms, since_ms=metadata.as_of_ms)}"
    yield Text.assemble(
        (_time(metadata.computed_at_ms), "dim"),
        "  ",
        (_printable(features.user), "bold"),
        f"  {metadata.reason}  offset {metadata.source_offset}  set {metadata.feature_set}{until}",
    )
    width = max(map(len, features.values), default=0)
    for name, value in features.values.items():
        notes = ["estimate"] * (name in metadata.estimated)
        if name in metadata.completeness:
            notes.append(f"has seen {metadata.completeness[name]:.0%} of its window")
        noted = f"  ({', '.join(notes)})" if notes else ""
        yield Text.assemble(f"  {_printable(name):<{width}}  ", (_value(value), "cyan"), (noted, "yellow"))


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        shown = (f"{_printable(each[0])} {each[1]:g}" if isinstance(each, list) else _printable(each) for each in value)
        return f"[{', '.join(shown)}]"
    return str(value)


def _time(time_ms: int, since_ms: int | None = None) -> str:
    """Return a time of day in UTC, with its date if it is another day than `since_ms`."""
    try:
        at = datetime.fromtimestamp(time_ms / 1000, UTC)
        is_far = since_ms is not None and at.date() != datetime.fromtimestamp(since_ms / 1000, UTC).date()
    except (OverflowError, ValueError, OSError):  # another producer's number
        return f"{time_ms} ms"
    return at.strftime("%Y-%m-%d %H:%M:%S" if is_far else "%H:%M:%S.%f")[: None if is_far else -3]


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
