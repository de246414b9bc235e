"""A lane keeps order, replaces its producer after any failure and before a count runs out, and spares other lanes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.default_records import DefaultRecordBatch
from aiokafka.structs import TopicPartition

from streams.engine import dead_letters, lanes
from streams.engine.dead_letters import HEADERS_OMITTED, KEY_OMITTED, VALUE_OMITTED, DeadLetters, shrunk
from streams.engine.lanes import Lane
from streams.engine.producers import ProducerPool
from streams.engine.topic_limits import TopicLimits
from streams.telemetry.metrics import Metrics
from streams.wire.embeddings import Message

OUT = TopicPartition("out", 0)
OTHER = TopicPartition("out", 1)


class Log:
    """A broker's partitions: it accepts a batch only if it continues the sequence of its producer, as Kafka does."""

    def __init__(self) -> None:
        self.records: dict[TopicPartition, list[Message]] = {}
        self.accepted: dict[tuple[int, TopicPartition], int] = {}
        """Records accepted by producer and partition."""
        self.refusing: dict[TopicPartition, Exception] = {}
        self.stuck: set[TopicPartition] = set()
        self.record_bytes_max = 1 << 30
        self.producers: list[Producer] = []

    def new_producer(self) -> Producer:
        """Return another idempotent producer."""
        self.producers.append(Producer(self, len(self.producers)))
        return self.producers[-1]

    def append(self, producer: Producer, tp: TopicPartition, first: int, records: list[Message]) -> int:
        """Append a batch whose first record is number `first` of its producer; return its offset."""
        if tp in self.refusing:
            raise self.refusing[tp]
        if any(len(value or b"") > self.record_bytes_max for _, value, _ in records):
            raise MessageSizeTooLargeError
        if self.accepted.get((producer.number, tp), 0) != first:
            raise KafkaError("OutOfOrderSequenceNumber")
        self.accepted[producer.number, tp] = first + len(records)
        log = self.records.setdefault(tp, [])
        log += records
        return len(log) - len(records)


class Producer:
    """An idempotent producer that counts a batch when it is sent, not when it is accepted, as aiokafka does."""

    _txn_manager = SimpleNamespace(transactional_id=None)

    def __init__(self, log: Log, number: int) -> None:
        self.log, self.number, self.closed = log, number, False
        self._sent: dict[TopicPartition, int] = {}

    async def start(self) -> None:
        """Connect."""
        await asyncio.sleep(0)

    async def stop(self) -> None:
        """Close."""
        self.closed = True

    def create_batch(self) -> Any:
        """Return an empty batch of aiokafka's own kind."""
        return BatchBuilder(1_000, 0)

    async def send_batch(self, batch: Any, topic: str, *, partition: int) -> asyncio.Future[Any]:
        """Send a batch; its result comes a little later."""
        assert not self.closed
        tp = TopicPartition(topic, partition)
        first = self._sent.get(tp, 0)
        self._sent[tp] = first + batch.record_count()
        parsed = DefaultRecordBatch(bytes(batch._builder.build()))
        records: list[Message] = [(each.key, each.value, list(each.headers)) for each in parsed]
        return asyncio.ensure_future(self._acknowledge(tp, first, records))

    async def _acknowledge(self, tp: TopicPartition, first: int, records: list[Message]) -> Any:
        await asyncio.sleep(0.001)
        while tp in self.log.stuck:
            await asyncio.sleep(0.001)
        return SimpleNamespace(offset=self.log.append(self, tp, first, records))


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "RETRY_FIRST_S", 0.001)
    monkeypatch.setattr(lanes, "RETRY_MAX_S", 0.002)


def one(text: str) -> list[Message]:
    """Return one message."""
    return [(b"ann", text.encode(), [])]


def in_loop(scenario: Callable[[Log, Callable[..., Lane]], Awaitable[None]]) -> Log:
    """Run a scenario over a new log; it gets a function that makes lanes of one pool."""
    log = Log()

    async def run() -> None:
        pool = ProducerPool(log.new_producer)
        await scenario(log, lambda tp=OUT, **limits: Lane(tp, pool, batch_bytes=lambda: 900_000, **limits))

    asyncio.run(run())
    return log


def texts(log: Log, tp: TopicPartition = OUT) -> list[str]:
    """Return the values in a partition, in order."""
    return [(value or b"").decode() for _, value, _ in log.records.get(tp, [])]


def test_after_a_refusal_the_next_message_goes_through() -> None:
    """A refused batch costs its call an error and its lane a producer; the next call succeeds."""

    async def scenario(log: Log, lane_of: Callable[..., Lane]) -> None:
        lane = lane_of()
        await lane.append(one("1"))
        log.refusing[OUT] = MessageSizeTooLargeError()
        for _ in range(3):
            with pytest.raises(MessageSizeTooLargeError):
                await lane.append(one("refused"))
        log.refusing.clear()
        assert await lane.append(one("2")) == 2

    log = in_loop(scenario)
    assert texts(log) == ["1", "2"]
    assert len(log.producers) == 4
    assert [each.closed for each in log.producers] == [True, True, True, False]


def test_messages_behind_a_refused_one_keep_their_order() -> None:
    """Calls that were under way when one is refused fail or succeed, but what is accepted is in order of the calls."""

    async def scenario(log: Log, lane_of: Callable[..., Lane]) -> None:
        lane = lane_of()
        log.record_bytes_max = 3
        calls = [lane.append(one("x" * 9 if number == 3 else str(number))) for number in range(10)]
        await asyncio.gather(*calls, return_exceptions=True)
        await lane.append(one("end"))

    numbers = texts(in_loop(scenario))
    assert numbers[-1] == "end"
    assert numbers[:-1] == sorted(numbers[:-1])


def test_a_tombstone_is_repeated_until_it_is_acknowledged_and_stays_in_place() -> None:
    """What must not be given up is repeated, and everything later waits behind it."""

    async def scenario(log: Log, lane_of: Callable[..., Lane]) -> None:
        lane = lane_of()
        log.refusing[OUT] = KafkaError("not now")
        delivered = asyncio.create_task(lane.deliver(one("forget")))
        await asyncio.sleep(0.01)
        later = asyncio.create_task(lane.append(one("later")))
        await asyncio.sleep(0.02)
        assert lane.unacknowledged_s() > 0.02
        log.refusing.clear()
        assert (await delivered, await later) == (1, 2)
        assert lane.unacknowledged_s() == 0.0

    assert texts(in_loop(scenario)) == ["forget", "later"]


def test_another_partition_of_the_same_producer_is_not_touched() -> None:
    """A lane that fails and one that is stuck leave a third one's producer and pace as they were."""

    async def scenario(log: Log, lane_of: Callable[..., Lane]) -> None:
        lane, other, stuck = lane_of(), lane_of(OTHER), lane_of(TopicPartition("out", 2))
        await other.append(one("0"))
        log.refusing[OUT] = KafkaError("not now")
        log.stuck.add(stuck.tp)
        waiting = asyncio.create_task(stuck.append(one("stuck")))
        for number in range(1, 5):
            with pytest.raises(KafkaError):
                await lane.append(one("refused"))
            async with asyncio.timeout(0.5):
                await other.append(one(str(number)))
        assert not log.producers[0].closed
        log.stuck.clear()
        await waiting

    log = in_loop(scenario)
    assert texts(log, OTHER) == ["0", "1", "2", "3", "4"]
    assert log.accepted[0, OTHER] == 5


def test_a_producer_is_replaced_before_its_count_runs_out() -> None:
    """No producer gets more records of one partition than the limit, and the order is kept across the change."""

    async def scenario(log: Log, lane_of: Callable[..., Lane]) -> None:
        lane = lane_of(records_max=5)
        await asyncio.gather(*(lane.append(one(f"{number:02}")) for number in range(23)))

    log = in_loop(scenario)
    assert texts(log) == [f"{number:02}" for number in range(23)]
    assert max(log.accepted.values()) == 5
    assert len(log.producers) == 5


def test_a_lane_settles_when_all_earlier_calls_have_ended() -> None:
    """Settling waits for what is in flight or has yet to get its turn, whether it succeeds or fails."""

    async def scenario(log: Log, lane_of: Callable[..., Lane]) -> None:
        lane = lane_of()
        log.stuck.add(OUT)
        first, second = (asyncio.create_task(lane.append(one(text))) for text in "12")
        settled = asyncio.create_task(lane.settle())
        await asyncio.sleep(0.01)
        assert not settled.done()
        log.refusing[OUT] = KafkaError("not now")
        log.stuck.clear()
        await settled
        await asyncio.sleep(0)
        assert first.done()
        assert second.done()
        await asyncio.gather(first, second, return_exceptions=True)

    in_loop(scenario)


def test_a_lane_is_busy_while_it_finds_out_whether_it_works_again() -> None:
    """After a failure one call is let through at a time; an idle lane is never busy."""

    async def scenario(log: Log, lane_of: Callable[..., Lane]) -> None:
        lane = lane_of()
        assert not lane.is_busy
        log.refusing[OUT] = KafkaError("not now")
        with pytest.raises(KafkaError):
            await lane.append(one("refused"))
        assert (lane.is_busy, lane.last_error) == (False, repr(KafkaError("not now")))
        log.refusing.clear()
        probe = asyncio.create_task(lane.append(one("probe")))
        await asyncio.sleep(0)
        assert lane.is_busy
        await probe
        assert (lane.is_busy, lane.last_error) == (False, None)

    in_loop(scenario)


def letters_of(lane: Lane, **limits: int) -> tuple[DeadLetters, Metrics]:
    """Return the dead letters of a lane, with known limits of their topic."""
    known, metrics = TopicLimits({}, ("out",)), Metrics()
    known._batch_max = dict(limits)
    return DeadLetters(lane, known, metrics, timeout_s=0.05), metrics


@pytest.mark.parametrize("known", [{"out": 1_000}, {}])
def test_a_letter_that_is_too_large_after_a_smaller_one_loses_only_its_value(known: dict[str, int]) -> None:
    """Whether the limit is known or only met, every letter arrives once, the large one without its value."""

    async def scenario(log: Log, lane_of: Callable[..., Lane]) -> None:
        log.record_bytes_max = 700
        letters, metrics = letters_of(lane_of(), **known)
        letters._limits.refresh = _nothing  # type: ignore[method-assign]
        await letters.deliver(one("small"))
        await letters.deliver([(b"ben", b"v" * 2_000, [("error-reason", b"too-large")])])
        await letters.deliver(one("after"))
        assert metrics.dead_letters_shortened.value() == 1

    log = in_loop(scenario)
    assert texts(log) == ["small", "", "after"]
    assert log.records[OUT][1] == (b"ben", None, [("error-reason", b"too-large"), (VALUE_OMITTED, b"2000")])


async def _nothing() -> None:
    """Do nothing."""


def test_a_letter_that_is_taken_in_no_form_waits_and_then_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A topic whose limit is below any record loses no letter: it is tried again, and arrives once."""
    monkeypatch.setattr(dead_letters, "NONE_FITS_S", 0.01)

    async def scenario(log: Log, lane_of: Callable[..., Lane]) -> None:
        letters, metrics = letters_of(lane_of())
        letters._limits.refresh = _nothing  # type: ignore[method-assign]
        log.refusing[OUT] = MessageSizeTooLargeError()
        delivered = asyncio.create_task(letters.deliver(one("whole")))
        await asyncio.sleep(0.1)
        assert not delivered.done()
        log.refusing.clear()
        await delivered
        assert metrics.dead_letters_shortened.value() <= 1

    log = in_loop(scenario)
    assert len(log.records[OUT]) == 1


def test_a_letter_shrinks_in_steps_until_nothing_is_left() -> None:
    """First the value goes, then the record's own headers, then the key; what names the record stays."""
    letter: Message = (b"key", b"value", [("own", b"12345"), ("error-reason", b"r")])
    sizes = []
    while (smaller := shrunk(letter)) is not None:
        letter = smaller
        sizes.append([name for name, _ in letter[2]])
    assert sizes == [
        ["own", "error-reason", VALUE_OMITTED],
        ["error-reason", VALUE_OMITTED, HEADERS_OMITTED],
        ["error-reason", VALUE_OMITTED, HEADERS_OMITTED, KEY_OMITTED],
    ]
    assert letter[:2] == (None, None)
