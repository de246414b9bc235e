"""The proof that nothing was lost or doubled: everything is recomputed from the input topic and compared.

The worker has stopped by then. From the input topic alone follow each user's history, so how many actions the
changelog must count for the user, which event the last embedding must contain, and what that embedding must be.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from encoder.actions.columns import Actions, SequenceBatch
from encoder.arrays import F32, I64
from encoder.inference import load_runtime
from infra.demo.histories import Histories, recompute
from infra.demo.observer import Observer, now_ms
from infra.errors import InfraError, detail
from streams.config.settings import Settings
from streams.storage.codec import HEAD_PREFIX, decode_head
from streams.wire.actions import DecodeLimits, decode_actions

Vector = F32

RECORDS_MAX = 20_000
FETCH_BYTES_MAX = 8 << 20
PARITY_USERS = 500
PARITY_CACHE_BYTES = 256 << 20
COSINE_MIN = 0.9999
"""Of law 1, for an encoder that computes in bfloat16."""


@dataclass(frozen=True, slots=True)
class Recount:
    """What the topics hold after the run."""

    events: int
    """Valid ones in the input topic."""
    dead_letters: int
    late_dropped: int
    """Late events that were older than everything in a full sequence; law 3 drops them."""
    lost: int
    """Actions that the state does not count, over all users."""
    duplicated: int
    """Actions that the state counts too often, over all users."""
    outdated: int
    """Users whose last embedding does not contain their last action."""
    parity_users: int
    cosine_min: float
    difference_max: float

    @property
    def faults(self) -> list[str]:
        """What is not as the laws have it, for people."""
        checks = (
            (self.lost, f"{self.lost} actions were lost"),
            (self.duplicated, f"{self.duplicated} actions were applied twice"),
            (self.outdated, f"{self.outdated} users have an embedding without their last action"),
            (self.cosine_min < COSINE_MIN, f"an embedding differs from its recomputation (cosine {self.cosine_min})"),
        )
        return [text for wrong, text in checks if wrong]


@dataclass(frozen=True, slots=True)
class Input:
    """The valid events of the input topic, in order of arrival within each partition."""

    user: I64
    offset: I64
    actions: Actions


async def recount(settings: Settings, user_keys: Sequence[bytes], observer: Observer, release_dir: Path) -> Recount:
    """Read the topics and compare; `observer` holds what was published."""
    events = await read_input(settings, user_keys)
    length_max = settings.state.sequence_length
    times_ms = events.actions["timestamp_ms"]
    histories = recompute(len(user_keys), events.user, times_ms, events.actions["event_id"], length_max)
    counted = await read_counts(settings, user_keys)
    last_offsets = np.where(histories.last_rows < 0, -1, events.offset[histories.last_rows])
    sample = parity_sample(histories)
    cosine, difference = parity(sample, events.actions, histories, user_keys, observer.last_vectors(), release_dir)
    return Recount(
        events=len(events.user),
        dead_letters=await count_records(settings, settings.topics.dead_letter),
        late_dropped=len(events.user) - len(histories.rows),
        lost=int(np.maximum(0, histories.counts - counted).sum()),
        duplicated=int(np.maximum(0, counted - histories.counts).sum()),
        outdated=int((observer.newest_offset != last_offsets).sum()),
        parity_users=len(sample),
        cosine_min=cosine,
        difference_max=difference,
    )


async def read_input(settings: Settings, user_keys: Sequence[bytes]) -> Input:
    """Every valid event of the input topic, read from its beginning."""
    user_of = {key: user for user, key in enumerate(user_keys)}
    limits = DecodeLimits(**settings.decode.model_dump())
    columns: dict[int, list[tuple[I64, I64, Actions]]] = {}
    async for partition, records in read_topic(settings, settings.topics.actions):
        batch = decode_actions(records, now_ms=now_ms(), limits=limits).actions
        users = np.array([user_of[user] for user in batch.users], np.int64)
        columns.setdefault(partition, []).append((users, batch.offsets, batch.actions))
    parts = [part for partition in sorted(columns) for part in columns[partition]]
    user, offset, actions = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Input(user, offset, actions)


async def read_counts(settings: Settings, user_keys: Sequence[bytes]) -> I64:
    """[U] actions that the changelog's last head of each user counts, 0 for a user without one."""
    heads: dict[bytes, bytes | None] = {}
    async for _, records in read_topic(settings, settings.changelog_topic):
        heads.update((record.key[1:], record.value) for record in records if record.key[:1] == HEAD_PREFIX)
    return np.array([_count(key, heads.get(key)) for key in user_keys], np.int64)


def _count(user: bytes, head: bytes | None) -> int:
    return int(decode_head(user, head)[0]["count"][0]) if head else 0


async def count_records(settings: Settings, topic: str) -> int:
    """Records in a topic."""
    return sum([len(records) async for _, records in read_topic(settings, topic)])


async def read_topic(settings: Settings, topic: str) -> AsyncIterator[tuple[int, list[Any]]]:
    """(partition, records) from the beginning to the end as of the call, committed ones only; raises `InfraError`.

    A commit is acknowledged before its markers are written, and until then a reader of committed records sees the end
    before it: the end read up to is that of everything written, and transactions still open are waited for.
    """
    partitions = [TopicPartition(topic, number) for number in range(settings.topics.partitions)]
    client = settings.kafka.client_options()
    consumer = AIOKafkaConsumer(
        enable_auto_commit=False,
        isolation_level="read_committed",
        max_partition_fetch_bytes=FETCH_BYTES_MAX,
        **client,
    )
    try:
        async with AIOKafkaConsumer(isolation_level="read_uncommitted", **client) as everything:
            ends = await everything.end_offsets(partitions)
        await consumer.start()
        consumer.assign(partitions)
        await consumer.seek_to_beginning()
        left = set(partitions)
        while left := {tp for tp in left if await consumer.position(tp) < ends[tp]}:
            for tp, records in (await consumer.getmany(timeout_ms=200, max_records=RECORDS_MAX)).items():
                yield tp.partition, records
    except KafkaError as error:
        raise InfraError(f"cannot read {topic} again", detail(error), "see that the broker is up") from error
    finally:
        await consumer.stop()


def parity_sample(histories: Histories) -> I64:
    """At most `PARITY_USERS` users with a history, evenly spread over all of them."""
    users = np.flatnonzero(histories.counts)
    places = np.linspace(0, len(users) - 1, min(PARITY_USERS, len(users))).astype(np.int64)
    sample: I64 = users[places]
    return sample


def parity(
    sample: I64,
    actions: Actions,
    histories: Histories,
    user_keys: Sequence[bytes],
    published: dict[int, Vector],
    release_dir: Path,
) -> tuple[float, float]:
    """(least cosine, greatest absolute difference) between published and recomputed embeddings of the sample.

    Recomputed by the full runtime in float32, from the last M actions of each history. A user without a published
    embedding has cosine 0.
    """
    runtime = load_runtime(release_dir, kind="full", cache_bytes_max=PARITY_CACHE_BYTES, dtype="fp32")
    begin = np.maximum(histories.starts[sample], histories.starts[sample + 1] - runtime.sequence_length)
    rows = [histories.rows[first:end] for first, end in zip(begin, histories.starts[sample + 1], strict=True)]
    batch = SequenceBatch(
        users=[user_keys[user] for user in sample],
        actions=actions[np.concatenate(rows)],
        starts=np.cumsum([0, *map(len, rows)]),
        counts=histories.counts[sample],
        revisions=np.zeros(len(sample), np.int64),
    )
    recomputed = runtime.embed(batch)
    nothing = np.zeros(runtime.embedding_dim, np.float32)
    held = np.stack([published.get(user, nothing) for user in sample.tolist()])
    return float((recomputed * held).sum(axis=1).min()), float(np.abs(recomputed - held).max())
