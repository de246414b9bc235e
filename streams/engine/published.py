"""What the output topic holds beyond the restored state, noted before a partition is processed.

A replay must publish nothing again (invariant 5: monotone), so each user has to be known by the newest source offset
that was published of it. How many users that are depends on the start. After a crash they are those of the last second.
Beside a large output topic, under a new application id or after a rewound mark, they are all users there ever were. So
the topic is read page by page, with a turn of the event loop after each, and what is kept depends on the user:

- *stored, and its state knows*: nothing;
- *stored, and its state is behind*: the user may be due, so it is loaded and corrected soon, as after a crash;
- *not stored*: a note in the local database, which is looked up when an event brings the user in. Nothing is in memory,
  and nothing is written to the changelog for a user who never acts again.

Notes mean nothing once every event up to the newest of their source offsets has been applied. Until then checkpoints
leave the mark's output offset where it was, so that the next owner reads the same outputs, and then they are deleted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

from encoder.arrays import I64
from streams.core.columns import rows_where
from streams.core.partition_state import PartitionState
from streams.engine.own_records import Published
from streams.storage.codec import CheckpointMark
from streams.storage.reader import NOT_STORED, encoded_offsets
from streams.storage.store import Store

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Noted:
    """The outcome of noting what is published."""

    end: int
    """Offset after the last record of the partition of embeddings."""
    features_end: int
    """Offset after the last record of the partition of features."""
    until: int
    """Source offset from which on the notes mean nothing; 0 without notes."""
    replayed_at: int = 0
    """Source offset from which on nothing that is published is ahead of the state."""


async def note_published(
    embeddings: AsyncGenerator[Published] | None,
    features: AsyncGenerator[Published] | None,
    state: PartitionState,
    store: Store,
    mark: CheckpointMark,
    on_page: Callable[[int], None],
) -> Noted:
    """Note the published source offsets of all users in the pages of both topics; None for one that is not written.

    `on_page(notes made)` is called after each page.
    """
    store.drop_notes()  # those of an earlier acquisition, perhaps of another encoder version
    ends, until, replayed_at = [mark.output_offset, mark.features_offset], 0, 0
    for index, pages in enumerate((embeddings, features)):
        if pages is not None:
            of_topic = await _note_all(pages, state, store, on_page)
            ends[index], until = of_topic.end, max(until, of_topic.until)
            replayed_at = max(replayed_at, of_topic.newest + 1)
    return Noted(ends[0], ends[1], until, replayed_at)


class _OfTopic(NamedTuple):
    end: int
    until: int
    newest: int
    """Newest source offset of a record, -1 without one."""


async def _note_all(
    pages: AsyncGenerator[Published], state: PartitionState, store: Store, on_page: Callable[[int], None]
) -> _OfTopic:
    """Note what is in one topic; return its end, and the source offset from which on the notes mean nothing."""
    end = until = notes = 0
    newest = -1
    reported = time.monotonic()
    async with aclosing(pages):
        async for page in pages:
            of_page = _note(page, state, store)
            end, until, notes = page.end, max(until, int(of_page.max(initial=-1)) + 1), notes + len(of_page)
            newest = max(newest, page.newest)
            on_page(len(of_page))
            if time.monotonic() - reported >= PROGRESS_EVERY_S:
                logger.info("the outputs are read up to offset %d; %d users without state are noted", end, notes)
                reported = time.monotonic()
            await asyncio.sleep(0)
    return _OfTopic(end, until, newest)


def _note(page: Published, state: PartitionState, store: Store) -> I64:
    """Note the users of one page where that is needed; return the source offsets of the notes in the store."""
    stored = encoded_offsets(store, page.users)
    behind = rows_where((stored != NOT_STORED) & (stored < page.source_offsets))
    state.seed_published([page.users[row] for row in behind.tolist()], page.source_offsets[behind])
    new = rows_where(stored == NOT_STORED)
    if len(new):
        store.note([page.users[row] for row in new.tolist()], page.source_offsets[new].tolist())
    return page.source_offsets[new]
