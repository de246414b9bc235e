"""Delivery of dead letters: each one in the largest form that its topic takes, until it is acknowledged.

A rejected record may be larger than the dead-letter topic allows, or than any request that the broker reads. Then its
value is left out, if necessary its own headers and its key too, and a header holds the size of each. The record itself
stays in the source topic, and the headers name its place.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from aiokafka.errors import MessageSizeTooLargeError
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from streams.engine.lanes import Lane
from streams.engine.topic_limits import TopicLimits
from streams.telemetry.metrics import Metrics
from streams.wire.dead_letters import ERROR_HEADERS
from streams.wire.embeddings import Message

logger = logging.getLogger(__name__)

VALUE_OMITTED = "error-value-omitted-bytes"
"""Header of a dead letter whose value the topic did not accept: its size. The value stays in the source topic."""
HEADERS_OMITTED = "error-headers-omitted-bytes"
"""Header of a dead letter without the record's own headers: their size."""
KEY_OMITTED = "error-key-omitted-bytes"
"""Header of a dead letter without its key: its size."""
OWN_HEADERS = {*ERROR_HEADERS, VALUE_OMITTED, HEADERS_OMITTED, KEY_OMITTED}
RECORD_OVERHEAD_BYTES = 21
"""What aiokafka adds to its estimate of a size, for the longest possible lengths and offsets."""
NONE_FITS_S = 1.0
"""Delay after which a letter is tried again that its topic took in no form."""
SUSPECT_BYTES = 65_536
"""Size from which an unacknowledged letter may be one whose request the broker closes the connection for."""


class DeadLetters:
    """Delivers the dead letters of one partition."""

    def __init__(self, lane: Lane, limits: TopicLimits, metrics: Metrics, *, timeout_s: float) -> None:
        self.lane, self._limits, self._metrics, self._timeout_s = lane, limits, metrics, timeout_s

    async def deliver(self, letters: Sequence[Message]) -> None:
        """Send letters, in batches as the topic takes them; return once all are acknowledged."""
        forms = [(letter, self._fitting(letter)) for letter in letters]
        for pack in _packs(forms, self._limits.batch_bytes(self.lane.tp.topic)):
            if not await self._is_refused([form for _, form in pack]):
                self._count_shortened(pack)
                continue
            for letter, _ in pack:
                await self._deliver_one(letter)

    async def _deliver_one(self, letter: Message) -> None:
        """Send the largest form of a letter that is accepted; while none is, begin again with the whole letter."""
        while True:
            form: Message | None = self._fitting(letter)
            while form is not None:
                if not await self._is_refused([form]):
                    self._count_shortened([(letter, form)])
                    return
                form = shrunk(form)
            logger.error("the topic %s takes no dead letter, however small; it is tried again", self.lane.tp.topic)
            await asyncio.sleep(NONE_FITS_S)

    def _fitting(self, letter: Message) -> Message:
        """Return the largest form of the letter that is within the known limit, or the smallest one."""
        limit = self._limits.record_bytes(self.lane.tp.topic)
        form: Message | None = letter
        while limit is not None and form is not None and size_of(form) > limit:
            letter, form = form, shrunk(form)
        return letter if form is None else form

    def _count_shortened(self, pack: Sequence[tuple[Message, Message]]) -> None:
        for letter, form in pack:
            if form is not letter:
                self._metrics.dead_letters_shortened.inc()
                logger.warning(
                    "a dead letter of %d bytes is too large for its topic; it is sent without the value",
                    size_of(letter),
                )

    async def _is_refused(self, pack: Sequence[Message]) -> bool:
        """Send letters until they are acknowledged; return True if they are too large instead."""
        while True:
            sending = asyncio.ensure_future(self.lane.append(pack))
            try:
                while not (await asyncio.wait({sending}, timeout=self._timeout_s))[0]:
                    if sum(map(size_of, pack)) >= SUSPECT_BYTES and await self.lane.is_reachable():
                        # The leader answers, so it is this request for which it closes the connection.
                        self.lane.abandon()
                        await asyncio.wait({sending})
                        return True
                sending.result()
            except MessageSizeTooLargeError:
                await self._limits.refresh()
                return True
            except Exception as error:
                logger.warning("%d dead letters could not be delivered and are sent again: %r", len(pack), error)
            else:
                return False
            finally:
                sending.cancel()


def size_of(message: Message) -> int:
    """Return the size of a batch that holds only this message, at least to within 21 bytes."""
    key, value, headers = message
    size: int = DefaultRecordBatchBuilder.estimate_size_in_bytes(key, value, headers)
    return size - RECORD_OVERHEAD_BYTES


def shrunk(letter: Message) -> Message | None:
    """Return the letter without its largest optional part that it still has; None if nothing is left to omit."""
    key, value, headers = letter
    if value is not None:
        return key, None, [*headers, (VALUE_OMITTED, b"%d" % len(value))]
    foreign = [(name, content) for name, content in headers if name not in OWN_HEADERS]
    if foreign:
        size = sum(len(name) + len(content or b"") for name, content in foreign)
        own = [(name, content) for name, content in headers if name in OWN_HEADERS]
        return key, None, [*own, (HEADERS_OMITTED, b"%d" % size)]
    return (None, None, [*headers, (KEY_OMITTED, b"%d" % len(key))]) if key else None


def _packs(forms: Sequence[tuple[Message, Message]], batch_bytes: int) -> Iterator[list[tuple[Message, Message]]]:
    """Cut letters, each with the form to send, into runs that fit into one batch; a larger form is alone in its run."""
    pack: list[tuple[Message, Message]] = []
    room = batch_bytes
    for letter, form in forms:
        size = size_of(form)
        if pack and size > room:
            yield pack
            pack, room = [], batch_bytes
        pack.append((letter, form))
        room -= size
    if pack:
        yield pack


def weight_of(letters: Sequence[Message]) -> int:
    """Return the bytes of keys, values and headers that letters keep in memory."""
    return sum(_weight(*letter) for letter in letters)


def _weight(key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, Any]]) -> int:
    return len(key or b"") + len(value or b"") + sum(len(name) + len(content or b"") for name, content in headers)
