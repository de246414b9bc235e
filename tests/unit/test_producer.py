"""Actions are checked by the worker's rules before they are sent, and `streamformer send` reports what was wrong."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from kafka.errors import KafkaError, KafkaTimeoutError

import streams.producer
from infra.cli import main
from streams import producer as producer_module
from streams.errors import BrokerUnreachable, StreamformerError
from streams.producer import ActionProducer, ActionRejected, SendFailed
from streams.wire.actions import DecodeLimits

VALID = b'{"user_id": "ann", "item_id": "i-1", "action": "view", "timestamp_ms": 1700000000000}'


class Stored(NamedTuple):
    """The place where the fake broker stored a record."""

    partition: int
    offset: int


@dataclass
class Acknowledgement:
    """A future of the fake client: done at once, or failed."""

    stored: Stored
    error: KafkaError | None = None
    is_done: bool = True

    def get(self, timeout: float) -> Stored:
        """Return the place of the record, or raise."""
        if self.error:
            raise self.error
        return self.stored


@dataclass
class FakeClient:
    """Stands in for kafka-python's producer, as far as `ActionProducer` uses it, and keeps what it was given."""

    topics: tuple[str, ...] = ("user-actions",)
    fails_from: int = 1_000_000
    sent: list[tuple[str, bytes, bytes]] = field(default_factory=list)
    is_closed: bool = False

    def partitions_for(self, topic: str) -> set[int]:
        """Return the partitions of a topic that exists; kafka-python raises for any other."""
        if topic not in self.topics:
            raise KafkaTimeoutError("no metadata")
        return {0}

    def send(self, topic: str, *, key: bytes, value: bytes) -> Acknowledgement:
        """Keep the record; those from number `fails_from` on are never acknowledged."""
        self.sent.append((topic, key, value))
        count = len(self.sent)
        error = KafkaTimeoutError("request timed out") if count > self.fails_from else None
        return Acknowledgement(Stored(0, count - 1), error)

    def close(self, timeout: float) -> None:
        """Note the call."""
        self.is_closed = True


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """The client that every producer of the test gets."""
    fake = FakeClient()
    monkeypatch.setattr(streams.producer, "KafkaProducer", lambda **_: fake)
    return fake


def test_an_action_is_keyed_by_its_user(client: FakeClient) -> None:
    """The record's key is the user id in UTF-8; absent fields are absent; the receipt names place and event id."""
    with ActionProducer("localhost:9092") as producer:
        receipt = producer.send("änn", "i-1", "view", timestamp_ms=1_700_000_000_000, event_id="e-1")
    topic, key, value = client.sent[0]
    assert (topic, key) == ("user-actions", "änn".encode())
    assert json.loads(value) == {
        "user_id": "änn",
        "item_id": "i-1",
        "action": "view",
        "timestamp_ms": 1_700_000_000_000,
        "event_id": "e-1",
    }
    assert (receipt.event_id, receipt.partition, receipt.offset) == ("e-1", 0, 0)
    assert client.is_closed


def test_time_and_event_id_have_defaults(client: FakeClient) -> None:
    """Without a time the action happens now, and each action gets an event id of its own."""
    with ActionProducer("localhost:9092") as producer:
        ids = {producer.send("ann", "i-1", "view").event_id for _ in range(3)}
    assert len(ids) == 3
    now_ms = json.loads(client.sent[0][2])["timestamp_ms"]
    assert 1_700_000_000_000 < now_ms < 4_000_000_000_000


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "not-json"),
        (b"hello", "not-json"),
        (b"[1, 2]", "field-type"),
        (VALID + VALID, "not-json"),
        (b"[" * 100_000, "value-too-large"),
        (b'{"x": ' + b"[" * 60_000, "not-json"),
        (b'{"user_id": "a\xff"}', "not-utf8"),
        (VALID.replace(b'"user_id": "ann", ', b""), "field-missing"),
        (VALID.replace(b'"ann"', b"7"), "field-type"),
        (VALID.replace(b'"ann"', b'""'), "field-length"),
        (VALID.replace(b'"ann"', b'"' + b"a" * 257 + b'"'), "field-length"),
        (VALID.replace(b"1700000000000", b"1700000000"), "timestamp-unit"),
        (VALID.replace(b"1700000000000", b"17"), "timestamp-past"),
        (VALID.replace(b"1700000000000", b"99999999999999"), "timestamp-future"),
        (VALID.replace(b"}", b', "duration_ms": -1}'), "field-range"),
    ],
)
def test_what_a_worker_would_reject_is_not_sent(client: FakeClient, value: bytes, reason: str) -> None:
    """Each kind of bad input raises `ActionRejected` with the reason of its dead letter, and nothing is sent."""
    producer = ActionProducer("localhost:9092")
    with pytest.raises(ActionRejected, match=f"rejected as {reason}") as caught:
        producer.send_json(value)
    assert caught.value.reason == reason
    assert (client.sent, producer.rejected) == ([], 1)


def test_limits_are_those_of_the_workers(client: FakeClient) -> None:
    """A limit of the settings that differs from the default decides."""
    producer = ActionProducer("localhost:9092", limits=DecodeLimits(id_chars_max=2))
    with pytest.raises(ActionRejected, match="field-length"):
        producer.send("ann", "i", "view")


def test_an_action_without_acknowledgement_is_an_error(client: FakeClient) -> None:
    """A record that the broker does not acknowledge raises `SendFailed`; earlier ones are counted."""
    client.fails_from = 2
    producer = ActionProducer("localhost:9092")
    producer.send_json(VALID)
    producer.send_json(VALID)
    with pytest.raises(SendFailed, match="request timed out"):
        producer.send_json(VALID)
    assert producer.acknowledged == 2


def test_a_slow_acknowledgement_is_announced(client: FakeClient, caplog: pytest.LogCaptureFixture) -> None:
    """While the broker is silent a warning states how long the producer waits, and then the record counts."""

    class Slow(Acknowledgement):
        """Not acknowledged within the first wait."""

        def get(self, timeout: float) -> Stored:
            """Raise for a short wait."""
            if timeout == producer_module.NOTICE_S:
                raise KafkaTimeoutError("not yet")
            return self.stored

    client.send = lambda topic, *, key, value: Slow(Stored(0, 7), is_done=False)  # type: ignore[method-assign]
    producer = ActionProducer("localhost:9092")
    assert producer.send("ann", "i", "view").offset == 7
    assert "acknowledged nothing for 2 s" in caplog.text
    assert producer.acknowledged == 1


def test_a_missing_topic_is_reported(client: FakeClient) -> None:
    """A topic that does not exist is an error that names it, and the connection is closed."""
    with pytest.raises(StreamformerError, match="topic nowhere does not exist"):
        ActionProducer("localhost:9092", topic="nowhere")
    assert client.is_closed


def test_a_silent_address_is_reported() -> None:
    """An address where nothing listens is one line that names it."""
    with pytest.raises(BrokerUnreachable, match=r"no broker answers at 127\.0\.0\.1:1"):
        ActionProducer("127.0.0.1:1")


class Result(NamedTuple):
    """The outcome of a call of the script."""

    code: int
    out: str
    error: str


Send = Callable[..., Result]


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Send:
    """`streamformer send` with these arguments and this standard input."""

    def called(*arguments: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["streamformer", "send", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        out, error = capsys.readouterr()
        return Result(int(ended.value.code or 0), out, error)

    return called


def test_lines_are_sent_unchanged(client: FakeClient, send: Send) -> None:
    """Each line becomes one record with the line's bytes, also the last line without a newline; blank lines do not."""
    result = send("-", stdin=VALID + b"\r\n\n" + VALID.replace(b"ann", b"bob"))
    assert result == (0, "2 sent, 0 rejected\n", "")
    assert [(key, value) for _, key, value in client.sent] == [
        (b"ann", VALID),
        (b"bob", VALID.replace(b"ann", b"bob")),
    ]


def test_bad_lines_are_reported_and_the_rest_is_sent(client: FakeClient, send: Send) -> None:
    """Each bad line is one line on standard error with its number and reason; the exit code is 1 at the end."""
    result = send("-", "--json", stdin=b"\n".join([VALID, b"{}", VALID, b"oops", VALID]))
    assert result.code == 1
    assert json.loads(result.out) == {"sent": 3, "rejected": 2}
    assert [line.split(": ")[:2] for line in result.error.splitlines()] == [
        ["line 2", "rejected as field-missing"],
        ["line 4", "rejected as not-json"],
    ]


def test_counts_are_printed_also_when_the_broker_fails(client: FakeClient, send: Send) -> None:
    """A broker that stops acknowledging ends the command with the counts so far and one line of error."""
    client.fails_from = 1
    result = send("-", stdin=b"\n".join([VALID] * 3))
    assert (result.code, result.out) == (1, "1 sent, 0 rejected\n")
    assert result.error.startswith("error: the broker has not acknowledged an action")


def test_one_action_is_reported_with_its_place(client: FakeClient, send: Send) -> None:
    """Text names partition, offset and event id; `--json` is one object with the same."""
    assert send("ann", "i-1", "--event-id", "e-1") == (0, "sent to partition 0 at offset 0, event id e-1\n", "")
    result = send("ann", "i-1", "--event-id", "e-2", "--action", "buy", "--json")
    assert json.loads(result.out) == {"sent": 1, "rejected": 0, "event_id": "e-2", "partition": 0, "offset": 1}
    assert json.loads(client.sent[1][2])["action"] == "buy"


def test_a_rejected_action_is_one_line(client: FakeClient, send: Send) -> None:
    """A time in seconds is rejected with exit code 1, without a traceback."""
    result = send("ann", "i-1", "--timestamp-ms", "1700000000")
    assert (result.code, result.out) == (1, "")
    assert result.error.startswith("error: rejected as timestamp-unit")
    assert len(result.error.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("ann",), ("-", "i-1"), ("-", "--surface", "home"), ("-", "--event-id", "e")])
def test_wrong_usage_exits_with_2(client: FakeClient, send: Send, arguments: tuple[str, ...]) -> None:
    """A user without an item, and - together with a field, are usage errors."""
    assert send(*arguments).code == 2
    assert client.sent == []


def test_fakes_take_what_the_client_takes() -> None:
    """The fake's methods exist on kafka-python's producer."""
    names: Any = [name for name in vars(FakeClient) if not name.startswith("_") and callable(getattr(FakeClient, name))]
    assert names == ["partitions_for", "send", "close"]
    assert all(hasattr(streams.producer.KafkaProducer, name) for name in names)
