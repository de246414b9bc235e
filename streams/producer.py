"""Send actions to Kafka: the library for the applications in which users act.

    with ActionProducer("127.0.0.1:9092") as producer:
        receipt = producer.send("ann", "i-17", "view", surface="home")

Every action is checked by the rules that the worker applies, so what the worker would write to the dead-letter topic
raises `ActionRejected` here. Records are keyed by user id and partitioned by murmur2, as docs/reference/contracts.md
requires. An application in another language needs nothing from this module: a record of JSON with the right key is
enough.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import msgspec
from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError

from streams.errors import BrokerUnreachable, StreamformerError
from streams.wire.actions import DecodeLimits, Rejected, decode_actions

logger = logging.getLogger(__name__)

ANSWER_MS = 5_000
"""Time that the broker may take to answer the first request."""
ACKNOWLEDGE_S = 30.0
"""Further time that the broker may take to acknowledge a record."""
IN_FLIGHT_MAX = 10_000
"""Records that may be unacknowledged at once; beyond it `send_json` waits for the oldest."""
NOTICE_S = 2.0
"""Time without an acknowledgement after which a warning is logged."""


class ActionRejected(StreamformerError):
    """The worker would write this action to the dead-letter topic, for `reason`."""

    def __init__(self, rejected: Rejected) -> None:
        super().__init__(
            f"rejected as {rejected.reason}", rejected.detail, "see the fields in docs/reference/contracts.md"
        )
        self.reason, self.detail = rejected.reason, rejected.detail


class SendFailed(StreamformerError):
    """The broker has not acknowledged a record."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """The place where the broker stored an action."""

    event_id: str
    partition: int
    offset: int


class ActionProducer:
    """A producer of actions for one topic; not safe to share between threads."""

    def __init__(
        self,
        bootstrap_servers: str,
        *,
        topic: str = "user-actions",
        limits: DecodeLimits | None = None,
        client: Mapping[str, Any] | None = None,
    ) -> None:
        """Connect to the broker.

        `limits` are those of the workers (`decode.*` in their settings); `client` holds more of kafka-python's options
        (security). Raises `BrokerUnreachable`, or `StreamformerError` where the topic does not exist.
        """
        self.acknowledged = 0
        """Number of records that the broker has acknowledged."""
        self.rejected = 0
        """Number of actions that were not sent because a worker would reject them."""
        self._topic, self._limits = topic, limits or DecodeLimits()
        self._in_flight: deque[Any] = deque()
        options = {**(client or {}), "bootstrap_servers": bootstrap_servers}
        try:
            self._producer = KafkaProducer(
                bootstrap_timeout_ms=ANSWER_MS, max_block_ms=ANSWER_MS, allow_auto_create_topics=False, **options
            )
            self._require_topic()
        except KafkaError as error:
            raise BrokerUnreachable(
                f"no broker answers at {bootstrap_servers}", str(error), "check the address and that the broker is up"
            ) from None

    def send(
        self,
        user_id: str,
        item_id: str,
        action: str,
        *,
        timestamp_ms: int | None = None,
        surface: str | None = None,
        duration_ms: int | None = None,
        event_id: str | None = None,
    ) -> Receipt:
        """Send one action and return when the broker has acknowledged it.

        Without `timestamp_ms` the action happens now; without `event_id` it gets a random one. Raises `ActionRejected`
        or `SendFailed`.
        """
        event = {
            "user_id": user_id,
            "item_id": item_id,
            "action": action,
            "timestamp_ms": _now_ms() if timestamp_ms is None else timestamp_ms,
            "surface": surface,
            "duration_ms": duration_ms,
            "event_id": uuid.uuid4().hex if event_id is None else event_id,
        }
        value = msgspec.json.encode({name: field for name, field in event.items() if field is not None})
        stored = self._acknowledgement(self._send(value))
        return Receipt(str(event["event_id"]), stored.partition, stored.offset)

    def send_json(self, value: bytes) -> None:
        """Send an action that is already JSON, unchanged, without waiting for the broker; `flush` waits.

        Raises `ActionRejected`, or `SendFailed` where an earlier record was not acknowledged.
        """
        self._in_flight.append(self._send(value))
        while self._in_flight and (self._in_flight[0].is_done or len(self._in_flight) > IN_FLIGHT_MAX):
            self._acknowledgement(self._in_flight.popleft())

    def flush(self) -> None:
        """Wait until the broker has acknowledged every record; raise `SendFailed` where it does not."""
        while self._in_flight:
            self._acknowledgement(self._in_flight.popleft())

    def close(self) -> None:
        """Close the connection; what `flush` has not confirmed may be lost."""
        self._producer.close(timeout=ANSWER_MS / 1_000)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_topic(self) -> None:
        try:
            partitions = self._producer.partitions_for(self._topic)
        except KafkaError:
            partitions = None
        if not partitions:
            self.close()
            remedy = "create it (`streamformer topics create`), or correct `topics.actions`"
            raise StreamformerError("nowhere to send to", f"topic {self._topic} does not exist", remedy)

    def _send(self, value: bytes) -> Any:
        key = _user_of(value)
        decoded = decode_actions([_Unsent(key, value)], now_ms=_now_ms(), limits=self._limits)
        if decoded.rejected:
            self.rejected += 1
            raise ActionRejected(decoded.rejected[0])
        try:
            return self._producer.send(self._topic, key=key, value=value)
        except KafkaError as error:
            raise _send_failed(error) from None

    def _acknowledgement(self, future: Any) -> Any:
        try:
            stored = self._stored(future)
        except KafkaError as error:
            raise _send_failed(error) from None
        self.acknowledged += 1
        return stored

    @staticmethod
    def _stored(future: Any) -> Any:
        """Return where a record was stored, after a warning if that takes long; raise `KafkaError` if it is not."""
        try:
            return future.get(timeout=NOTICE_S)
        except KafkaTimeoutError:
            if future.is_done:
                raise
        logger.warning("the broker has acknowledged nothing for %g s; waiting %g s", NOTICE_S, ACKNOWLEDGE_S)
        return future.get(timeout=ACKNOWLEDGE_S)


@dataclass(frozen=True, slots=True)
class _Unsent:
    """A record as the worker would read it."""

    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes], ...] = ()
    offset: int = 0
    timestamp: int = 0


class _OfUser(msgspec.Struct):
    user_id: str


_USER = msgspec.json.Decoder(_OfUser)


def _user_of(value: bytes) -> bytes:
    """Return the key of an action: its user id, or nothing where the decoder is about to report what is wrong."""
    try:
        return _USER.decode(value).user_id.encode()
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return b""


def _send_failed(error: KafkaError) -> SendFailed:
    text = str(error) or type(error).__name__
    return SendFailed("the broker has not acknowledged an action", text, "check the broker, then send it again")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
