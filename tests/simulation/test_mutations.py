"""The simulation finds defects: each of these mutations, alone, violates an invariant within a few histories."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from encoder.actions.columns import ActionBatch
from encoder.arrays import F32, I64
from infra.harness.simulation import history as h
from infra.harness.simulation.broker import Broker
from infra.harness.simulation.history import History
from infra.harness.simulation.schedule import failure, histories
from streams.core import partition_state, snapshots
from streams.core.effects import Effects
from streams.core.features.partition import PartitionFeatures
from streams.core.jobs import EncodeJob
from streams.core.layout import LONG_AGO
from streams.core.merge import Outcome
from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.core.sequences import Applied, SequenceState
from streams.core.triggers import Triggers
from streams.encoding.partition_jobs import PartitionJobs
from streams.engine import acquisition, checkpoints, proof
from streams.engine import partitions as partitions_module
from streams.engine import published as published_module
from streams.engine.delivery import BatchConsumerThread
from streams.engine.lanes import Lane
from streams.engine.outputs import Outputs
from streams.engine.ownership import OwnedPartition
from streams.engine.partitions import Partitions
from streams.expiry import Expiry
from streams.ingest import Ingest
from streams.storage import checkpoint as checkpoint_module
from streams.storage import codec
from streams.storage.codec import encode, encode_mark
from streams.storage.memory_store import MemoryStore
from streams.storage.store import DEADLINE_PREFIX, OFFSET_KEY, Record
from tests.simulation.test_simulation import REGRESSIONS, WITH_FEATURES

HISTORIES = 400
DIRECTED: list[list[h.Step]] = [
    [h.Tombstone(0), h.Poison(0), h.Poll(2), h.Checkpoint(), h.Commit(30), h.Crash()],
    [h.Act(1), h.Tombstone(1), h.Late(1, 5_000), h.Poll(3)],
    [h.Act(5), h.Poll(1), h.Encode(1), h.Refuse(0), h.Tombstone(5), h.Poll(1), h.Deliver(1), h.Acknowledge()],
]
"""Histories for mutations that random ones find late."""
DIRECTED_FEATURES: list[list[h.Step]] = [
    [*(h.Act(0) for _ in range(9)), h.Late(0, 3_590_000), h.Poll(4), h.Poll(4), h.Poll(4)],
]
"""The same, with features."""
Patch = pytest.MonkeyPatch


def no_dedupe_by_offset(patch: Patch) -> None:
    """Apply events again whose source offset was applied before."""
    apply = SequenceState.apply

    def forgetful(self: SequenceState, batch: ActionBatch) -> Applied:
        self.headers["applied_offset"][self.rows_of(batch.users)] = -1
        return apply(self, batch)

    patch.setattr(SequenceState, "apply", forgetful)


def no_dedupe_by_event_id(patch: Patch) -> None:
    """Apply events again whose event id is among the kept actions."""
    patch.setattr("streams.core.sequences._fingerprint", lambda ids: np.arange(len(ids)).astype(np.uint16))
    patch.setattr(SequenceState, "_repeated_in_batch", lambda self, ids, rows: rows[:0])


def forgotten_users_come_back(patch: Patch) -> None:
    """Apply events that are older than the tombstone of their user."""
    apply = SequenceState.apply

    def lenient(self: SequenceState, batch: ActionBatch) -> Applied:
        self.headers["forgotten_ms"][self.rows_of(batch.users)] = LONG_AGO
        return apply(self, batch)

    patch.setattr(SequenceState, "apply", lenient)


def late_events_do_not_rewrite_chunks(patch: Patch) -> None:
    """Treat chunks as durable that a late event has changed."""
    begin = snapshots.begin

    def lazy(state: SequenceState) -> Any:
        rows = state.hot_rows()
        stored = state.live["stored_keys"][rows].astype(np.int64) * state.limits.chunk_length
        state.live["dirty_from"][rows] = np.maximum(state.live["dirty_from"][rows], stored)
        return begin(state)

    patch.setattr(snapshots, "begin", lazy)


def store_before_commit(patch: Patch) -> None:
    """Write the store before the transaction commits."""

    async def checkpoint(state: Any, mark: Any, outputs: Any, changelog: Any, store: Any) -> int:
        snapshot = state.begin_checkpoint()
        records = [*encode(snapshot, state.limits), encode_mark(mark)]
        await outputs.acknowledged()
        await changelog.begin()
        offset = await changelog.append(records)
        for _ in store.write_steps(records, offset):
            await asyncio.sleep(0)
        await changelog.send_source_offset(mark.source_offset)
        await changelog.commit()
        state.commit_checkpoint(snapshot)
        return len(records)

    patch.setattr(checkpoints, "checkpoint", checkpoint)


def outputs_after_commit(patch: Patch) -> None:
    """Wait for outputs only after the transaction has committed."""

    class Late:
        async def acknowledged(self) -> None: ...

    original = checkpoint_module.checkpoint

    async def checkpoint(state: Any, mark: Any, outputs: Any, changelog: Any, store: Any) -> int:
        written = await original(state, mark, Late(), changelog, store)
        await outputs.acknowledged()
        return written

    patch.setattr(checkpoints, "checkpoint", checkpoint)


def offset_in_the_first_batch(patch: Patch) -> None:
    """Write the changelog offset with the first batch of a write instead of the last."""
    write_steps = MemoryStore.write_steps

    def hasty(self: MemoryStore, records: Sequence[Record], changelog_offset: int) -> Iterator[None]:
        self.put(OFFSET_KEY, changelog_offset.to_bytes(8, "little"))
        return write_steps(self, records, changelog_offset)

    patch.setattr(MemoryStore, "write_steps", hasty)


def no_fencing(patch: Patch) -> None:
    """Let a replaced producer write."""
    patch.setattr(Broker, "is_fenced", lambda self, producer, transactional_id: False)


def published_outputs_are_not_seeded(patch: Patch) -> None:
    """Ignore what the output topic holds beyond the mark."""
    patch.setattr(partition_state.PartitionState, "seed_published", lambda self, users, offsets: None)


def mark_passes_unseen_outputs(patch: Patch) -> None:
    """Let the mark pass outputs that the state does not contain yet."""
    patch.setattr(partition_state.PartitionState, "has_unseen_outputs", False)


def outdated_embeddings_are_published(patch: Patch) -> None:
    """Publish embeddings of users that were forgotten or published since their job began."""
    patch.setattr(partition_state.PartitionState, "drop_outdated", lambda self, job: np.arange(len(job)))


def due_users_are_lost_in_a_crash(patch: Patch) -> None:
    """Leave deadlines out of the store."""
    patch.setattr("streams.storage.store.deadline_of", lambda head: 2**63 - 1)


def cooldown_is_ignored(patch: Patch) -> None:
    """Hand users over within their cooldown."""
    hand_over = Triggers._hand_over

    def hasty(self: Triggers, headers: Any, live: Any, due: Any, promoted: Any, now_ms: int) -> Any:
        headers["last_encoded_ms"] = LONG_AGO
        return hand_over(self, headers, live, due, promoted, now_ms)

    patch.setattr(Triggers, "_hand_over", hasty)


def promotions_are_lost(patch: Patch) -> None:
    """Hand a user that waits in the queue over only once, even if it becomes due for a more valuable reason."""
    hand_over = Triggers._hand_over

    def once(self: Triggers, headers: Any, live: Any, due: Any, promoted: Any, now_ms: int) -> Any:
        waits = live["queued"].copy()
        return hand_over(self, headers, live, due, promoted, now_ms) & ~waits

    patch.setattr(Triggers, "_hand_over", once)


def staleness_fires_late(patch: Patch) -> None:
    """Fire the staleness timer 3 s late."""
    stale_ms = Triggers._stale_ms

    def late(self: Triggers, headers: Any, live: Any) -> I64:
        return np.minimum(stale_ms(self, headers, live), 2**62) + 3_000

    patch.setattr(Triggers, "_stale_ms", late)


def a_batch_may_evict_its_own_users(patch: Patch) -> None:
    """Spare no user when a batch makes room."""
    evict = partition_state.PartitionState.evict

    def careless(self: partition_state.PartitionState, room: int, *, spare: Sequence[bytes]) -> int:
        return evict(self, room)

    patch.setattr(partition_state.PartitionState, "evict", careless)


def chunks_are_not_written(patch: Patch) -> None:
    """Write heads without their chunks."""
    patch.setattr(codec, "_encode_chunks", lambda snapshot, limits: [])


def output_producer_is_kept_after_a_failed_batch(patch: Patch) -> None:
    """Go on with a producer of which a batch was refused."""
    note_failure = Lane._note_failure

    def forgiving(self: Lane, error: BaseException) -> None:
        note_failure(self, error)
        self._is_broken = False

    patch.setattr(Lane, "_note_failure", forgiving)


def identity_is_not_compared(patch: Patch) -> None:
    """Take every log for the one that the state is derived from."""
    prove = proof.prove

    def trusting(names: proof.Names, found: proof.Found) -> proof.Proven:
        mark = found.mark and replace(found.mark, identity=None)
        return prove(names, replace(found, mark=mark))

    patch.setattr(acquisition, "prove", trusting)


def high_watermark_for_last_stable_offset(patch: Patch) -> None:
    """Measure progress against records that nobody can read yet."""
    end = BatchConsumerThread.end

    def high(self: BatchConsumerThread, tp: Any) -> tuple[int, int]:
        return end(self, tp)[1], end(self, tp)[1]

    patch.setattr(BatchConsumerThread, "end", high)


def former_owner_publishes(patch: Patch) -> None:
    """Publish what was encoded before the partition's state was read again."""
    patch.setattr(OwnedPartition, "is_closed", property(lambda self: False, lambda self, value: None))


def outputs_in_flight_are_overlooked(patch: Patch) -> None:
    """Read what was published while this worker has outputs in flight."""

    async def hasty(self: Lane) -> None: ...

    patch.setattr(Lane, "settle", hasty)


def tombstones_are_lost_while_giving_back(patch: Patch) -> None:
    """Perform nothing for a partition that is being given back, although its next checkpoint commits the events."""
    perform = Ingest._perform

    def careless(self: Ingest, owned: OwnedPartition, effects: Effects) -> None:
        if owned in self._jobs:
            perform(self, owned, effects)

    patch.setattr(Ingest, "_perform", careless)


def features_are_not_cleared_when_forgotten(patch: Patch) -> None:
    """Keep the features of a forgotten user."""
    patch.setattr(PartitionFeatures, "clear", lambda self, rows: None)


def features_count_repetitions(patch: Patch) -> None:
    """Add events to the features that the sequence drops because it has them."""
    apply = PartitionFeatures.apply

    def twice(self: PartitionFeatures, batch: ActionBatch, applied: Applied) -> None:
        outcomes = np.where(applied.outcomes == Outcome.DUPLICATE, Outcome.APPLIED, applied.outcomes)
        apply(self, batch, replace(applied, outcomes=outcomes.astype(np.uint8)))

    patch.setattr(PartitionFeatures, "apply", twice)


def features_skip_what_is_too_old_for_the_sequence(patch: Patch) -> None:
    """Leave out events that are older than everything kept."""
    patch.setattr("streams.core.features.partition._TOO_OLD", 99)


def embeddings_do_not_wait_for_features(patch: Patch) -> None:
    """Publish embeddings whose features are not acknowledged."""
    publish = PartitionJobs._publish

    async def hasty(self: PartitionJobs, job: EncodeJob, embeddings: F32) -> None:
        await publish(self, replace(job, features=None), embeddings)

    patch.setattr(PartitionJobs, "_publish", hasty)


def tombstones_go_to_the_first_topic_only(patch: Patch) -> None:
    """Publish no tombstones of features."""
    patch.setattr(Outputs, "topics", property(lambda self: self._config.outputs[:1]))


def tombstones_go_to_the_last_topic_only(patch: Patch) -> None:
    """Publish no tombstones of embeddings where there are features."""
    patch.setattr(Outputs, "topics", property(lambda self: self._config.outputs[-1:]))


def features_are_not_stored(patch: Patch) -> None:
    """Write checkpoints without features."""
    patch.setattr(checkpoint_module, "encode_features", lambda snapshot: [])


def published_features_are_not_read(patch: Patch) -> None:
    """Read only the embeddings when a partition is acquired."""
    note = published_module.note_published

    async def half(embeddings: Any, features: Any, *rest: Any) -> Any:
        return await note(embeddings, None, *rest)

    patch.setattr(published_module, "note_published", half)
    for module in (partitions_module, acquisition):
        patch.setattr(module, "note_published", half, raising=False)


def refreshes_are_lost_in_a_crash(patch: Patch) -> None:
    """Leave refreshes out of the stored index."""
    patch.setattr(MemoryStore, "pending", lambda self: pending_deadlines(self))


def pending_deadlines(store: MemoryStore) -> Iterator[tuple[bytes, int]]:
    """Yield the deadlines of embeddings only."""
    keys = [key for key in sorted(store.records) if key[:1] == DEADLINE_PREFIX]
    return ((key[1:], int.from_bytes(store.records[key], "little", signed=True)) for key in keys)


def refreshes_do_not_fire(patch: Patch) -> None:
    """Never publish a user again because of time."""
    patch.setattr(PartitionFeatures, "due", lambda self, rows, now_ms: rows[:0])


def users_do_not_expire(patch: Patch) -> None:
    """Never look for users without an action for the TTL."""

    async def idle(self: Expiry, owned: OwnedPartition) -> None: ...

    patch.setattr(Expiry, "sweep", idle)


def a_sweep_trusts_the_last_fetch(patch: Patch) -> None:
    """Take the end of the log that the last fetch reported for the present one."""

    async def known(self: Partitions, owned: OwnedPartition) -> int:
        return self.ends(owned)[0]

    patch.setattr(Partitions, "read_end", known)


def expired_users_keep_their_features(patch: Patch) -> None:
    """Clear the features of users who are forgotten by the sweep only in the sequence."""
    expire = PartitionState.expire

    def partly(self: PartitionState, users: Sequence[bytes], now_ms: int, offset: int) -> Effects:
        features, self.features = self.features, None
        try:
            return expire(self, users, now_ms, offset)
        finally:
            self.features = features

    patch.setattr(PartitionState, "expire", partly)


MUTATIONS: list[Callable[[Patch], None]] = [
    no_dedupe_by_offset,
    no_dedupe_by_event_id,
    forgotten_users_come_back,
    late_events_do_not_rewrite_chunks,
    store_before_commit,
    outputs_after_commit,
    offset_in_the_first_batch,
    no_fencing,
    published_outputs_are_not_seeded,
    mark_passes_unseen_outputs,
    outdated_embeddings_are_published,
    due_users_are_lost_in_a_crash,
    cooldown_is_ignored,
    promotions_are_lost,
    staleness_fires_late,
    a_batch_may_evict_its_own_users,
    chunks_are_not_written,
    output_producer_is_kept_after_a_failed_batch,
    identity_is_not_compared,
    high_watermark_for_last_stable_offset,
    former_owner_publishes,
    outputs_in_flight_are_overlooked,
    tombstones_are_lost_while_giving_back,
    features_are_not_cleared_when_forgotten,
    features_count_repetitions,
    features_skip_what_is_too_old_for_the_sequence,
    embeddings_do_not_wait_for_features,
    tombstones_go_to_the_first_topic_only,
    tombstones_go_to_the_last_topic_only,
    features_are_not_stored,
    published_features_are_not_read,
    refreshes_are_lost_in_a_crash,
    refreshes_do_not_fire,
    users_do_not_expire,
    a_sweep_trusts_the_last_fetch,
    expired_users_keep_their_features,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutation_is_found(mutation: Callable[[Patch], None], monkeypatch: Patch) -> None:
    """Some known or generated history violates an invariant under this mutation."""
    mutation(monkeypatch)
    cases = [*REGRESSIONS.values(), *((TriggerPolicy(), steps) for steps in DIRECTED)]
    known = [History(policy, tuple(steps), count) for policy, steps in cases for count in (1, 2)]
    of_features = [*WITH_FEATURES.values(), *DIRECTED_FEATURES]
    known += [History(TriggerPolicy(), tuple(steps), 1, features=True, refresh_ms=200) for steps in of_features]
    assert any(failure(history) is not None for history in (*known, *histories(2024, HISTORIES)))
