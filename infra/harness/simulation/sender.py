"""The producers of a simulation: what they send goes to the source log and, once it can be read, to the model."""

from __future__ import annotations

import json

from encoder.actions.columns import item_key
from infra.harness.simulation import history as h
from infra.harness.simulation.broker import Broker, Record
from infra.harness.simulation.clock import Clock
from infra.harness.simulation.machine import low_bits
from infra.harness.simulation.model import Event, Model, Sequence
from infra.harness.simulation.worker import (
    SOURCE,
)

BEGIN_MS = 1_700_000_000_000
POISON = [
    b"{",
    b"\xff\xfe",
    b'{"user_id":"u0"}',
    b"[]",
    b'{"user_id":"u0","item_id":"i","action":"see","timestamp_ms":-5}',
]
TRANSACTIONAL = -1
"""Producer of transactions in the source topic."""


class Sender:
    """Sends events; the rest of the state is that of `Simulation`."""

    history: h.History
    broker: Broker
    models: list[Model]
    _events: list[dict[int, Event | None]]
    _sent: list[tuple[int, Record, Event | None]]
    _partition_of: dict[bytes, int]
    clock: Clock
    _clock_max_ms: int

    @property
    def now_ms(self) -> int:
        """Time of the senders."""
        return BEGIN_MS + round(self.clock.now_s * 1_000)

    def _send(self, user: int, behind_ms: int, action: str, *, is_transactional: bool = False) -> None:
        number = len(self._sent)
        name, item = f"u{user}", f"i{number}"
        timestamp_ms = self._acting_ms(name.encode(), self.now_ms - behind_ms)
        body = {"user_id": name, "item_id": item, "action": action, "timestamp_ms": timestamp_ms}
        event_id = f"e{number}" if number % 3 else ""
        body |= {"event_id": event_id} if event_id else {}
        body |= {"value": number / 8} if number % 4 else {}
        value = json.dumps(body).encode()
        event = Event(
            name.encode(),
            timestamp_ms,
            low_bits(item_key(item)),
            item_key(event_id) if event_id else 0,
            strong=action == "buy",
            name=item,
            value=number / 8 if number % 4 else None,
        )
        self._log(self._partition_of[event.user], event.user, value, event, is_transactional=is_transactional)

    def _newest_of(self, user: bytes) -> Sequence:
        return self.models[self._partition_of[user]].past.get(user, [Sequence()])[-1]

    def _may_be_expired(self, user: bytes) -> bool:
        """Return whether a worker may have forgotten the user, because its clock has passed the TTL."""
        return self.models[0].is_expired(self._newest_of(user), self._clock_max_ms)

    def _acting_ms(self, user: bytes, timestamp_ms: int) -> int:
        """Return when a user acts; one who may be forgotten acts so late that it makes no difference.

        A sweep that is lost in a crash would otherwise decide what becomes of the event.
        """
        if not self._may_be_expired(user):
            return timestamp_ms
        return max(timestamp_ms, self._newest_of(user).kept[-1].timestamp_ms + self.history.user_ttl_ms)

    def _duplicate(self, step: h.Duplicate) -> None:
        if step.back <= len(self._sent):
            partition, record, event = self._sent[-step.back]
            if event is not None and self._may_be_expired(event.user):
                return
            self._log(partition, record.key, record.value, event)

    def _tombstone(self, step: h.Tombstone) -> None:
        user = b"u%d" % step.user
        self._log(self._partition_of[user], user, None, Event(user, self.now_ms, tombstone=True))

    def _poison(self, step: h.Poison) -> None:
        right = self._partition_of[b"u0"]
        if step.kind < len(POISON):
            self._log(right, b"u0", POISON[step.kind], None)
        elif self.history.partitions > 1:
            body = {"user_id": "u0", "item_id": "i", "action": "see", "timestamp_ms": self.now_ms}
            self._log(1 - right, b"u0", json.dumps(body).encode(), None)

    def _log(
        self,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        event: Event | None,
        *,
        is_transactional: bool = False,
    ) -> None:
        timestamp_ms = event.timestamp_ms if event is not None and event.tombstone else self.now_ms
        log = self.broker.topics[SOURCE].logs[partition]
        offset = log.append(
            [(key, value, [])], writer=TRANSACTIONAL, is_transactional=is_transactional, timestamp=timestamp_ms
        )
        self._events[partition][offset] = event
        self._sent.append((partition, (log.uncommitted if is_transactional else log.records)[offset], event))
        self._note_stable(partition)

    def _end_transactions(self, *, commit: bool) -> None:
        for partition, log in enumerate(self.broker.topics[SOURCE].logs):
            if not commit and log.open:
                for offset in log.uncommitted:
                    self._events[partition].pop(offset, None)
            log.end_transaction(TRANSACTIONAL, commit=commit)
            self._note_stable(partition)

    def _note_stable(self, partition: int) -> None:
        """Append what can be read by now to the model."""
        model, log, events = self.models[partition], self.broker.topics[SOURCE].logs[partition], self._events[partition]
        for offset in range(len(model.log), log.stable):
            if offset in events:
                model.append(events[offset])
            else:
                model.skip()
