"""The proof that no action was lost or doubled: recompute everything from the input topic and compare.

The worker has stopped by then. The input topic alone determines the history of each user, and so the actions that the
changelog must hold and count, the event that the last embedding must contain, and the value of that embedding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoder.actions.columns import Actions, SequenceBatch
from encoder.arrays import F32, I64
from encoder.inference import load_runtime
from infra.demo.contents import compare_contents
from infra.demo.features import FeatureRecount, SampledEvents, recount_features
from infra.demo.histories import Histories, recompute
from infra.demo.observer import Observer
from infra.harness.whole_topic import count_records, read_topic
from streams.config.settings import Settings
from streams.core.layout import StateLimits, StoredSequences
from streams.storage.codec import CHUNK_PREFIX, HEAD_PREFIX
from streams.storage.memory_store import MemoryStore
from streams.storage.reader import read_users
from streams.wire.actions import DecodeLimits, decode_actions

PARITY_USERS = 500
PARITY_CACHE_BYTES = 256 << 20
COSINE_MIN = 0.9999
"""Bound of the parity invariant for an encoder that computes in bfloat16."""


@dataclass(frozen=True, slots=True)
class Recount:
    """Result of the comparison."""

    events: int
    """Valid events in the input topic."""
    dead_letters: int
    late_dropped: int
    """Late events that were older than everything in a full sequence; the ordering invariant drops them."""
    lost: int
    """Actions that the state lacks, over all users."""
    duplicated: int
    """Actions that the state has too often, over all users."""
    misordered: int
    """Users whose state has the right actions in the wrong order."""
    outdated: int
    """Users whose last embedding does not contain their last action."""
    parity_users: int
    cosine_min: float
    difference_max: float
    features: FeatureRecount | None
    """None where the worker computes no features."""

    @property
    def faults(self) -> list[str]:
        """Violations of the invariants, as text."""
        checks = (
            (self.lost, f"{self.lost} actions were lost"),
            (self.duplicated, f"{self.duplicated} actions were applied twice"),
            (self.misordered, f"{self.misordered} users have their actions in the wrong order"),
            (self.outdated, f"{self.outdated} users have an embedding without their last action"),
            (self.cosine_min < COSINE_MIN, f"an embedding differs from its recomputation (cosine {self.cosine_min})"),
        )
        found = [text for is_wrong, text in checks if is_wrong]
        wrong = self.features.wrong if self.features else {}
        if wrong:
            user, problem = next(iter(wrong.items()))
            found.append(f"{len(wrong)} users have wrong features, such as {user}: {problem}")
        return found


@dataclass(frozen=True, slots=True)
class Input:
    """The valid events of the input topic, in order of arrival within each partition."""

    user: I64
    offset: I64
    actions: Actions

    def histories(self, users: int, length_max: int) -> Histories:
        """Return the history of each user."""
        return recompute(users, self.user, self.actions["timestamp_ms"], self.actions["event_id"], length_max)

    def last_offsets(self, users: int) -> I64:
        """[U] Return the offset of each user's last event, -1 for none: features contain those too late for a sequence.

        The demo sends no event twice.
        """
        found = np.full(users, -1, np.int64)
        np.maximum.at(found, self.user, self.offset)
        return found


async def recount(settings: Settings, user_keys: Sequence[bytes], observer: Observer, release_dir: Path) -> Recount:
    """Read the topics and compare; `observer` holds the published embeddings."""
    sample_of_features = SampledEvents.of(user_keys)
    events = await read_input(settings, user_keys, sample_of_features)
    length_max = settings.state.sequence_length
    histories = events.histories(len(user_keys), length_max)
    found = compare_contents(histories, events.actions, await read_state(settings, user_keys), length_max)
    last_offsets = np.where(histories.last_rows < 0, -1, events.offset[histories.last_rows])
    sample = parity_sample(histories)
    cosine, difference = parity(sample, events.actions, histories, user_keys, observer.last_vectors(), release_dir)
    return Recount(
        events=len(events.user),
        dead_letters=await count_records(settings, settings.topics.dead_letter),
        late_dropped=len(events.user) - len(histories.rows),
        lost=found.lost,
        duplicated=found.duplicated,
        misordered=found.misordered,
        outdated=int((observer.newest_offset != last_offsets).sum()),
        parity_users=len(sample),
        cosine_min=cosine,
        difference_max=difference,
        features=await recount_features(settings, user_keys, events.last_offsets(len(user_keys)), sample_of_features),
    )


async def read_input(settings: Settings, user_keys: Sequence[bytes], sample: SampledEvents) -> Input:
    """Read every valid event of the input topic, and pass the records to the sample for features."""
    user_of = {key: user for user, key in enumerate(user_keys)}
    limits = DecodeLimits(**settings.decode.model_dump(), with_values=settings.features.definitions_file is not None)
    columns: dict[int, list[tuple[I64, I64, Actions]]] = {}
    async for partition, records in read_topic(settings, settings.topics.actions):
        sample.take(records)
        batch = decode_actions(records, now_ms=time.time_ns() // 1_000_000, limits=limits).actions
        users = np.array([user_of[user] for user in batch.users], np.int64)
        columns.setdefault(partition, []).append((users, batch.offsets, batch.actions))
    batches = [batch for partition in sorted(columns) for batch in columns[partition]]
    user, offset, actions = (np.concatenate(column) for column in zip(*batches, strict=True))
    return Input(user, offset, actions)


async def read_state(settings: Settings, user_keys: Sequence[bytes]) -> StoredSequences:
    """[U] Return the state that the changelog holds; unknown and corrupt users get an empty one."""
    store, limits = MemoryStore(), StateLimits(settings.state.sequence_length, settings.state.chunk_length)
    async for _, records in read_topic(settings, settings.changelog_topic):
        of_users = [record for record in records if record.key[:1] in (HEAD_PREFIX, CHUNK_PREFIX)]
        store.write([(record.key, record.value) for record in of_users], changelog_offset=0)
    return read_users(store, user_keys, limits).stored


def parity_sample(histories: Histories) -> I64:
    """Return at most `PARITY_USERS` users with a history, evenly spread over all of them."""
    users = np.flatnonzero(histories.counts)
    places = np.linspace(0, len(users) - 1, min(PARITY_USERS, len(users))).astype(np.int64)
    sample: I64 = users[places]
    return sample


def parity(
    sample: I64,
    actions: Actions,
    histories: Histories,
    user_keys: Sequence[bytes],
    published: dict[int, F32],
    release_dir: Path,
) -> tuple[float, float]:
    """Return (least cosine, greatest absolute difference) between published and recomputed embeddings of the sample.

    The full runtime recomputes them in float32, from the last M actions of each history. A user without a published
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
    recomputed = runtime.embed(batch)  # [S, E]
    none = np.zeros(runtime.embedding_dim, np.float32)
    last = np.stack([published.get(user, none) for user in sample.tolist()])
    return float((recomputed * last).sum(axis=1).min()), float(np.abs(recomputed - last).max())
