"""A synthetic changelog, as a long-running worker would have left it: the codec's records, in transactions with marks.

Users are generated in columns and written in random order, because a worker does not sort them either. Two things
differ from a real changelog. Every user is written once, as after a compaction that has removed everything outdated.
And the source topic is empty, so the marks and the committed offset are 0 and no user has applied an event.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import kafka
import numpy as np
import numpy.typing as npt
from aiokafka.structs import TopicPartition

from encoder.actions.columns import ACTION_DTYPE
from encoder.arrays import I64, U8
from streams.config.settings import Settings
from streams.core.columns import starts_of
from streams.core.layout import Snapshot, StateLimits, new_headers
from streams.engine.changelog import ChangelogNames, ChangelogProducer
from streams.storage.codec import CheckpointMark, encode, encode_mark

FIRST_USER = 1_000_000
"""User numbers begin here, so that every id has the same length."""
USERS_MAX = 9_000_000
WRITERS = 2
CHECKPOINT_USERS = 4_000
DAY_MS = 86_400_000
NEWEST_MS = 1_790_000_000_000
LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class SyntheticState:
    """Users that all have the same number of actions; the same seed gives the same users."""

    users: int
    actions: int
    seed: int = 0

    def records(self, limits: StateLimits) -> int:
        """Return the records of all users in the changelog, without marks."""
        return self.users * (1 + self.actions // limits.chunk_length)


def user_id(number: int) -> bytes:
    """Return the id of user `number`, the key of its events and its state."""
    return b"user-%d" % number


def writers() -> ProcessPoolExecutor:
    """Return processes for `fill`; keep them for several calls, because each takes seconds to start."""
    return ProcessPoolExecutor(WRITERS, mp_context=multiprocessing.get_context("spawn"))


def fill(
    pool: ProcessPoolExecutor, settings: Settings, state: SyntheticState, on_progress: Callable[[int], None]
) -> None:
    """Write the changelog of `state`; `on_progress(records in the log)` is called as it grows."""
    tps = [kafka.TopicPartition(settings.changelog_topic, number) for number in range(settings.topics.partitions)]
    consumer = kafka.KafkaConsumer(bootstrap_servers=settings.kafka.bootstrap_servers)
    pending = {pool.submit(_fill_partition, settings, state, tp.partition) for tp in tps}
    while pending:
        done, pending = wait(pending, timeout=LOOK_EVERY_S)
        for each in done:
            each.result()
        on_progress(sum(consumer.end_offsets(tps).values()))
    consumer.close()


def partition_of(numbers: I64, partitions: int) -> I64:
    """Return the partition of each user: Kafka's murmur2 of its id, in columns."""
    return (murmur2(_ids(numbers)).astype(np.int64) & 0x7FFFFFFF) % partitions


def murmur2(ids: U8) -> npt.NDArray[np.uint32]:
    """Return Kafka's murmur2 of each row of `ids` [N, 4 k bytes]; constants as in `org.apache.kafka.common.utils`."""
    words = np.ascontiguousarray(ids).view("<u4")
    multiplier = np.uint32(0x5BD1E995)
    h = np.full(len(words), np.uint32(0x9747B28C ^ ids.shape[1]), np.uint32)
    for column in range(words.shape[1]):
        k = words[:, column] * multiplier
        k ^= k >> np.uint32(24)
        h = (h * multiplier) ^ (k * multiplier)
    h ^= h >> np.uint32(13)
    h *= multiplier
    return h ^ (h >> np.uint32(15))


def _ids(numbers: I64) -> U8:
    """Return the ids of `user_id` as rows of bytes, [N, 12]."""
    digits = (numbers[:, None] // 10 ** np.arange(6, -1, -1)) % 10  # [N, 7], the first digit first
    prefix = np.frombuffer(b"user-", np.uint8)
    return np.concatenate((np.tile(prefix, (len(numbers), 1)), (digits + ord("0")).astype(np.uint8)), axis=1)


def _fill_partition(settings: Settings, state: SyntheticState, partition: int) -> None:
    names = ChangelogNames(
        group_id=settings.app_id,
        source=TopicPartition(settings.topics.actions, partition),
        changelog=TopicPartition(settings.changelog_topic, partition),
    )
    limits = StateLimits(settings.state.sequence_length, settings.state.chunk_length)
    numbers = FIRST_USER + np.arange(state.users)
    mine = numbers[partition_of(numbers, settings.topics.partitions) == partition]
    rng = np.random.default_rng((state.seed, partition))
    asyncio.run(_write(names, settings.kafka.client_options(), _snapshots(rng, mine, state.actions, limits), limits))


async def _write(
    names: ChangelogNames, client: Mapping[str, Any], snapshots: Iterator[Snapshot], limits: StateLimits
) -> None:
    producer = ChangelogProducer(names, client, transaction_timeout_ms=60_000)
    await producer.start()
    for snapshot in snapshots:
        await producer.begin()
        await producer.append([*encode(snapshot, limits), encode_mark(CheckpointMark(0, 0))])
        await producer.send_source_offset(0)
        await producer.commit()
    await producer.stop()


def _snapshots(rng: np.random.Generator, numbers: I64, actions: int, limits: StateLimits) -> Iterator[Snapshot]:
    """Yield the content of each checkpoint: every user once, in random order."""
    shuffled = rng.permutation(numbers)
    for begin in range(0, len(shuffled), CHECKPOINT_USERS):
        yield _snapshot(rng, shuffled[begin : begin + CHECKPOINT_USERS], actions, limits)


def _snapshot(rng: np.random.Generator, numbers: I64, actions: int, limits: StateLimits) -> Snapshot:
    users, length = len(numbers), limits.chunk_length
    chunks, tail = divmod(actions, length)
    headers = new_headers(users, limits)
    headers["count"] = headers["unencoded"] = actions
    headers["tail"] = tail
    headers["first_unencoded_ms"] = NEWEST_MS
    rows = _actions(rng, users, actions)  # [users, actions]; a sequence is its full chunks, then a tail
    none = np.zeros(0, np.int64)
    return Snapshot(
        users=[user_id(number) for number in numbers.tolist()],
        headers=headers,
        tails=rows[:, chunks * length :].reshape(-1),
        tail_starts=starts_of(np.full(users, tail)),
        chunk_users=np.repeat(np.arange(users), chunks),
        chunk_numbers=np.tile(np.arange(chunks), users),
        chunks=rows[:, : chunks * length].reshape(users * chunks, length),
        deleted_users=none,
        deleted_keys=none,
        dirty_from=np.zeros(users, np.int64),
        stored_keys=np.zeros(users, np.int64),
        emptied=np.zeros(users, np.bool_),
        gone=np.zeros(users, np.bool_),
    )


def _actions(rng: np.random.Generator, users: int, actions: int) -> npt.NDArray[np.void]:
    """Return [users, actions] of ACTION_DTYPE, oldest first, over 30 days; ids are random, as hashes are."""
    rows = np.zeros((users, actions), ACTION_DTYPE)
    shape = rows.shape
    for column in ("item", "event_id"):
        rows[column] = rng.integers(1, 2**63, size=shape, dtype=np.uint64)
    rows["action"] = rng.integers(1, 5, size=shape)
    rows["surface"] = 1
    rows["duration_ms"] = rng.integers(60_000, size=shape)
    rows["timestamp_ms"] = NEWEST_MS - np.sort(rng.integers(30 * DAY_MS, size=shape), axis=1)[:, ::-1]
    return rows
