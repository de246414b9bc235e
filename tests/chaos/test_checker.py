"""The checker passes a faithful log, and names each fault that is put into one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from encoder.inference import EncoderRuntime
from encoder.inference.kernel import Precision
from encoder.inference.runtime import make_full
from encoder.model import EncoderConfig
from infra.chaos.checks.checker import Checker, Rules, Verdict
from infra.chaos.checks.violations import Explained, Kind
from infra.harness.history import History, LogRecord
from infra.harness.releases import random_release
from streams.core.layout import StateLimits
from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.storage.codec import CheckpointMark, chunk_key, encode, encode_mark
from streams.storage.memory_store import MemoryStore
from streams.storage.reader import read_users
from streams.storage.rebase import rebase
from streams.wire.actions import DecodeLimits, decode_actions
from streams.wire.embeddings import EmbeddingBatch, EmbeddingCodec, encode_embeddings, encode_tombstone

LIMITS = StateLimits(sequence_length=8, chunk_length=4)
NOW_MS = 1_700_000_000_000
TOPIC = "actions"


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """Topics and committed offset of a run."""

    history: History
    committed: int

    def judge(self, encoder: EncoderRuntime, *explained: Explained, sample_every: int = 0) -> Verdict:
        """Return the verdict of a new checker."""
        rules = Rules(LIMITS.sequence_length, LIMITS.chunk_length, encoder.version, TOPIC, sample_every, explained)
        checker = Checker(rules, encoder)
        checker.feed(self.history)
        return checker.judge({0: self.committed})


@pytest.fixture(scope="module")
def encoder() -> EncoderRuntime:
    """Return a tiny encoder with random weights."""
    config = EncoderConfig(
        d_model=16, heads=2, kv_heads=1, windows=(3, 3), embedding_dim=8, item_dim=8, sequence_length=8
    )
    return make_full(random_release(config, seed=1), cache_bytes_max=1 << 22, precision=Precision(), native=False)


def sent() -> list[LogRecord]:
    """Return thirty actions of three users: late ones, duplicates, ties, tombstones, a rejected record."""
    rng = np.random.default_rng(7)
    records: list[LogRecord] = []

    def send(key: bytes, value: bytes | None) -> None:
        records.append(LogRecord(0, len(records), NOW_MS + len(records), key, value))

    for number in range(30):
        for user in ("ann", "bob", "cy"):
            lateness_ms = int(rng.integers(0, 2_500)) if rng.random() < 0.2 else 0
            event = {
                "user_id": user,
                "item_id": f"item-{number}",
                "action": "click",
                "timestamp_ms": NOW_MS - 100_000 + number * 1_000 - lateness_ms,
                "duration_ms": number + 1,
                "event_id": f"{user}-{number - 1 if rng.random() < 0.1 else number}",
            }
            send(user.encode(), json.dumps(event).encode())
        if number == 12:
            send(b"cy", b"{")
            send(b"bob", None)
    for number in range(5):  # cy ends forgotten; bob acts again after the tombstone's time
        event = {"user_id": "bob", "item_id": "x", "action": "save", "timestamp_ms": NOW_MS + 900 + number}
        send(b"bob", json.dumps(event).encode())
    send(b"cy", None)
    return records


@dataclass(frozen=True, slots=True)
class _Received:
    key: bytes | None
    value: bytes | None
    offset: int
    timestamp: int
    headers: tuple[tuple[str, bytes], ...] = ()


def faithful(encoder: EncoderRuntime) -> RecordedRun:
    """Process `sent` with the real core and codec, in batches of seven: apply, encode due users, write a checkpoint."""
    inputs, changelog, outputs, letters = sent(), [], [], []
    state, store = PartitionState(TriggerPolicy(), LIMITS), MemoryStore()

    def append(log: list[LogRecord], key: bytes, value: bytes | None, headers: object = ()) -> None:
        log.append(LogRecord(0, len(log), NOW_MS + 5_000 + len(log), key, value, tuple(headers)))  # type: ignore[arg-type]

    for begin in range(0, len(inputs), 7):
        part = inputs[begin : begin + 7]
        received = [_Received(one.key, one.value, one.offset, one.timestamp_ms) for one in part]
        decoded = decode_actions(received, now_ms=NOW_MS + 10_000, limits=DecodeLimits())
        cold = state.missing(decoded.actions.users)
        state.load(cold, read_users(store, cold, LIMITS).stored)
        effects = state.apply(decoded.actions, NOW_MS)
        for rejected in decoded.rejected:
            origin = [("source-topic", TOPIC.encode()), ("source-partition", b"0")]
            error = [("error-reason", rejected.reason.encode()), ("source-offset", b"%d" % part[rejected.index].offset)]
            append(letters, part[rejected.index].key or b"", part[rejected.index].value, [*error, *origin])
        for user, offset in zip(effects.forgotten, effects.forgotten_offsets.tolist(), strict=True):
            append(outputs, *encode_tombstone(user, offset))
        if effects.due:
            for message in embeddings(encoder, state, effects.due):
                append(outputs, *message)
        records = [
            *encode(snapshot := state.begin_checkpoint(), LIMITS),
            encode_mark(CheckpointMark(part[-1].offset + 1, 0)),
        ]
        state.commit_checkpoint(snapshot)
        store.write(records, len(changelog))
        for key, value in records:
            append(changelog, key, value)
    return RecordedRun(History(inputs, changelog, outputs, letters), len(inputs))


def embeddings(encoder: EncoderRuntime, state: PartitionState, due: list[bytes]) -> list[tuple[object, ...]]:
    """Encode the due users; return key, value and headers of each output."""
    job = state.begin_job(due)
    state.finish_job(job.sequences.users, job.offsets, NOW_MS)
    batch = EmbeddingBatch(
        job.sequences.users,
        encoder.embed(job.sequences),
        job.newest_event_ms,
        np.diff(job.sequences.starts),
        ["every_n"] * len(job),
        job.offsets,
        encoder.version,
        NOW_MS,
    )
    return list(encode_embeddings(batch, EmbeddingCodec.FLOAT32))


def rewritten(run: RecordedRun, user: bytes, change: Callable[[PartitionState, np.ndarray], np.ndarray]) -> RecordedRun:  # type: ignore[type-arg]
    """Return the run with one more checkpoint, in which `change` has altered the kept actions of `user`."""
    store = MemoryStore()
    for record in run.history.changelog:
        assert record.key is not None
        if record.value is not None:
            store.put(record.key, record.value)
    state = PartitionState(TriggerPolicy(), LIMITS)
    stored = read_users(store, [user], LIMITS).stored
    actions = change(state, stored.actions.copy())
    headers = stored.headers.copy()
    headers["count"] += len(actions) - len(stored.actions)
    state.load([user], replace(stored, headers=headers, actions=actions, starts=np.array([0, len(actions)])))
    row = state._sequences.rows_of([user])
    state._sequences.live["dirty"][row] = True
    state._sequences.live["dirty_from"][row] = 0
    records = [*encode(state.begin_checkpoint(), LIMITS), encode_mark(CheckpointMark(run.committed, 0))]
    base = len(run.history.changelog)
    more = [LogRecord(0, base + i, NOW_MS, key, value) for i, (key, value) in enumerate(records)]
    return replace(run, history=replace(run.history, changelog=[*run.history.changelog, *more]))


def test_a_faithful_log_passes(encoder: EncoderRuntime) -> None:
    """Core and checker agree on late events, duplicates, ties, tombstones and rejected records."""
    verdict = faithful(encoder).judge(encoder)
    assert [str(violation) for violation in verdict.violations] == []
    assert verdict.counts["recomputed"] == 2
    assert verdict.counts["tombstones"] == 2
    assert verdict.counts["checkpoints"] == 14
    assert len(verdict.freshness_ms) > 60


def test_a_lost_action_is_named(encoder: EncoderRuntime) -> None:
    """A state without one of its actions is reported as lost, with the action's number."""
    run = rewritten(faithful(encoder), b"ann", lambda _, rows: rows[:-1])
    (lost,) = [one for one in run.judge(encoder).violations if one.kind is Kind.LOST]
    assert (lost.user, "number 30" in lost.detail) == (b"ann", True)


def test_a_doubled_action_is_named(encoder: EncoderRuntime) -> None:
    """A state that holds an action twice is reported as doubled."""
    run = rewritten(faithful(encoder), b"ann", lambda _, rows: np.concatenate((rows[1:], rows[-1:])))
    (doubled,) = [one for one in run.judge(encoder).violations if one.kind is Kind.DOUBLED]
    assert (doubled.user, "number 30" in doubled.detail) == (b"ann", True)


def test_swapped_actions_are_named(encoder: EncoderRuntime) -> None:
    """The right actions in the wrong order are reported as swapped, and as nothing else."""
    run = rewritten(faithful(encoder), b"ann", lambda _, rows: rows[[0, 1, 3, 2, 4, 5, 6, 7]])
    assert run.judge(encoder).kinds() == {Kind.SWAPPED: 1}


def appended(run: RecordedRun, record: LogRecord) -> RecordedRun:
    """Return the run with one more output."""
    return replace(run, history=replace(run.history, outputs=[*run.history.outputs, record]))


@pytest.mark.parametrize(("which", "kind"), [(0, Kind.STALE), (-1, Kind.REPEATED)])
def test_a_stale_or_repeated_embedding_is_named_unless_a_fault_explains_it(
    encoder: EncoderRuntime, which: int, kind: Kind
) -> None:
    """An old embedding after a newer one, and a repeated one, are permitted only in the time of a fault."""
    run = faithful(encoder)
    again = [record for record in run.history.outputs if record.key == b"ann"][which]
    stale = appended(run, replace(again, timestamp_ms=NOW_MS + 70_000))
    assert stale.judge(encoder).kinds() == {kind: 1}
    verdict = stale.judge(encoder, Explained(NOW_MS + 60_000, NOW_MS + 80_000))
    assert not verdict.violations
    assert verdict.counts[f"explained_{kind}"] == 1


def test_an_embedding_of_a_forgotten_user_is_named(encoder: EncoderRuntime) -> None:
    """An output after the user's tombstone is stale; without the tombstone the user is resurrected."""
    run = faithful(encoder)
    before = [record for record in run.history.outputs if record.key == b"cy" and record.value is not None][-1]
    assert appended(run, replace(before, timestamp_ms=NOW_MS)).judge(encoder).kinds() == {Kind.STALE: 1}
    kept = [record for record in run.history.outputs if not (record.key == b"cy" and record.value is None)]
    without = replace(run, history=replace(run.history, outputs=kept))
    assert without.judge(encoder).kinds() == {Kind.RESURRECTED: 1}


def test_a_wrong_or_missing_last_embedding_is_named(encoder: EncoderRuntime) -> None:
    """The last embedding must contain the last action and equal the embedding of the full history."""
    run = faithful(encoder)
    at = max(i for i, record in enumerate(run.history.outputs) if record.key == b"ann")
    outputs = list(run.history.outputs)
    last = outputs.pop(at)
    assert replace(run, history=replace(run.history, outputs=outputs)).judge(encoder).kinds() == {Kind.UNPUBLISHED: 1}
    assert last.value is not None
    vector = np.frombuffer(last.value, "<f4")[::-1]
    outputs.insert(at, replace(last, value=vector.tobytes()))
    wrong = replace(run, history=replace(run.history, outputs=outputs))
    assert wrong.judge(encoder).kinds() == {Kind.WRONG_EMBEDDING: 1}


def test_every_embedding_of_a_sampled_user_is_recomputed(encoder: EncoderRuntime) -> None:
    """A wrong vector that a right one follows is named if its user is in the sample, with its source offset."""
    run = faithful(encoder)
    whole = run.judge(encoder, sample_every=1)
    assert not whole.violations
    assert whole.counts["recomputed_of_sample"] == whole.counts["embeddings"]
    outputs = list(run.history.outputs)
    at = next(i for i, record in enumerate(outputs) if record.key == b"ann" and record.value is not None)
    assert outputs[at].value is not None
    vector = np.frombuffer(outputs[at].value, "<f4")[::-1]  # type: ignore[arg-type]
    outputs[at] = replace(outputs[at], value=vector.tobytes())
    wrong = replace(run, history=replace(run.history, outputs=outputs))
    assert not wrong.judge(encoder).violations
    (found,) = wrong.judge(encoder, sample_every=1).violations
    assert (found.kind, found.user) == (Kind.WRONG_EMBEDDING, b"ann")
    assert str(found.offset).encode() == dict(outputs[at].headers)["source-offset"]


def test_what_is_left_of_a_forgotten_user_is_named(encoder: EncoderRuntime) -> None:
    """A chunk from before the deletion, left in the changelog, is reported."""
    run = faithful(encoder)
    written = [record for record in run.history.changelog if record.key == chunk_key(b"cy", 1, LIMITS) and record.value]
    left = replace(written[0], offset=len(run.history.changelog))
    found = replace(run, history=replace(run.history, changelog=[*run.history.changelog, left])).judge(encoder)
    assert [(one.kind, one.user) for one in found.violations] == [(Kind.LEFTOVER, b"cy")]


def test_an_embedding_with_untrue_headers_is_named(encoder: EncoderRuntime) -> None:
    """An output whose headers were not true at its source offset is reported, even if later ones are right."""
    run = faithful(encoder)
    outputs = list(run.history.outputs)
    headers = tuple((name, b"3" if name == "sequence-length" else value) for name, value in outputs[9].headers)
    outputs[9] = replace(outputs[9], headers=headers)
    assert Kind.WRONG_OUTPUT in replace(run, history=replace(run.history, outputs=outputs)).judge(encoder).kinds()


def test_a_checkpoint_ahead_of_or_behind_its_mark_is_named(encoder: EncoderRuntime) -> None:
    """Moving one head to the next checkpoint makes a checkpoint wrong, although the final state is right."""
    run = faithful(encoder)
    log = list(run.history.changelog)
    at = next(i for i, record in enumerate(log) if record.key == b"ubob")
    mark = next(i for i in range(at, len(log)) if log[i].key == b"m")
    log.insert(mark, log.pop(at))
    moved = replace(run, history=replace(run.history, changelog=log))
    assert moved.judge(encoder).kinds() == {Kind.WRONG_CHECKPOINT: 1}


@pytest.mark.parametrize(("by", "kind"), [(1, Kind.COMMITTED_AHEAD), (-1, Kind.COMMITTED_BEHIND)])
def test_a_commit_that_differs_from_the_state_is_named(encoder: EncoderRuntime, by: int, kind: Kind) -> None:
    """If the committed offset and the last mark differ, the checker names the one that is ahead."""
    run = faithful(encoder)
    assert kind in replace(run, committed=run.committed + by).judge(encoder).kinds()


def test_a_missing_altered_or_needless_dead_letter_is_named(encoder: EncoderRuntime) -> None:
    """Each rejected record has a dead letter with its bytes and reason, and no valid record has one."""
    run = faithful(encoder)
    (letter,) = run.history.dead_letters

    def with_letters(*letters: LogRecord) -> RecordedRun:
        return replace(run, history=replace(run.history, dead_letters=list(letters)))

    assert with_letters().judge(encoder).kinds() == {Kind.DEAD_LETTER_MISSING: 1}
    assert with_letters(replace(letter, value=b"{}")).judge(encoder).kinds() == {Kind.DEAD_LETTER_WRONG: 1}
    headers = tuple((name, b"4" if name == "source-offset" else value) for name, value in letter.headers)
    needless = with_letters(letter, replace(letter, headers=headers))
    assert needless.judge(encoder).kinds() == {Kind.DEAD_LETTER_WRONG: 1}


def settled(run: RecordedRun, encoder: EncoderRuntime, source_id: bytes = b"") -> Checker:
    """Return a checker that has judged a run, whose outputs name a log, and has settled."""
    rules = Rules(LIMITS.sequence_length, LIMITS.chunk_length, encoder.version, TOPIC, partitions=1)
    checker = Checker(rules, encoder)
    checker.feed(replace(run.history, outputs=[of_log(each, source_id) for each in run.history.outputs]))
    assert not checker.judge({0: run.committed}).violations
    checker.settle()
    return checker


def of_log(record: LogRecord, source_id: bytes) -> LogRecord:
    """Return an output that names a log."""
    return replace(record, headers=(*record.headers, ("source-id", source_id)))


def moved(
    run: RecordedRun, encoder: EncoderRuntime, to: int, offset_max: int, *, rebased_to: int | None = None
) -> History:
    """Return what follows an operator's move: the marks and heads of a rewrite, then an event, its output and state."""
    changelog: list[LogRecord] = []
    store, base = MemoryStore(), len(run.history.changelog)
    for record in run.history.changelog:
        if record.value is not None and record.key != b"m":
            store.put(record.key or b"", record.value)
    state = PartitionState(TriggerPolicy(), LIMITS)

    def append(records: object) -> None:
        for key, value in records:  # type: ignore[attr-defined]
            changelog.append(LogRecord(0, base + len(changelog), NOW_MS, key, value))
            if value is not None:
                store.put(key, value)

    heads = [(key[1:], value) for key, value in store.records.items() if key[:1] == b"u"]
    append([encode_mark(CheckpointMark(run.committed, 0, unfinished="streamformer state skip"))])
    append(rebase(heads, offset_max if rebased_to is None else rebased_to)[0])
    append([encode_mark(CheckpointMark(to, 0))])
    event = {"user_id": "ann", "item_id": "y", "action": "save", "timestamp_ms": NOW_MS + 990, "event_id": "new"}
    record = LogRecord(0, to, NOW_MS + 2_000, b"ann", json.dumps(event).encode())
    received = _Received(record.key, record.value, record.offset, record.timestamp_ms)
    decoded = decode_actions([received], now_ms=NOW_MS + 10_000, limits=DecodeLimits())
    state.load([b"ann"], read_users(store, [b"ann"], LIMITS).stored)
    due = state.apply(decoded.actions, NOW_MS).due
    outputs = [LogRecord(0, 1_000, NOW_MS + 9_000, *message) for message in embeddings(encoder, state, due)]  # type: ignore[arg-type]
    append([*encode(state.begin_checkpoint(), LIMITS), encode_mark(CheckpointMark(to + 1, 0))])
    return History([record], changelog, outputs)


@pytest.mark.parametrize(("to", "offset_max"), [(60, 59), (0, -1)], ids=["skip", "adopt"])
def test_a_move_of_the_operator_is_followed(encoder: EncoderRuntime, to: int, offset_max: int) -> None:
    """After a truncation or in another log, sequences go on, and offsets below those of before are new."""
    run = faithful(encoder)
    history = moved(run, encoder, to, offset_max)
    history = replace(history, outputs=[of_log(each, b"new") for each in history.outputs])
    checker = settled(run, encoder, b"old")
    checker.move(0, to, offset_max)
    checker.feed(history)
    assert [str(one) for one in checker.judge({0: to + 1}).violations] == []
    unexpected = settled(run, encoder, b"old")
    unexpected.feed(history)
    assert Kind.WRONG_CHECKPOINT in unexpected.judge({0: to + 1}).kinds()


def test_a_move_that_is_not_carried_out_or_carried_out_wrongly_is_named(encoder: EncoderRuntime) -> None:
    """A missing mark, heads that keep offsets of the lost log, and outputs that name the old log are violations."""
    run = faithful(encoder)
    checker = settled(run, encoder)
    checker.move(0, 60, 59)
    assert Kind.WRONG_CHECKPOINT in checker.judge({0: run.committed}).kinds()
    history = moved(run, encoder, 60, 59, rebased_to=10_000)
    checker = settled(run, encoder)
    checker.move(0, 60, 59)
    checker.feed(history)
    assert Kind.WRONG_STATE in checker.judge({0: 61}).kinds()
    history = moved(run, encoder, 60, 59)
    checker = settled(run, encoder, b"old")
    checker.move(0, 60, 59)
    checker.feed(replace(history, outputs=[of_log(each, b"old") for each in history.outputs]))
    assert Kind.WRONG_OUTPUT in checker.judge({0: 61}).kinds()


def test_misplaced_records_are_rejected_by_the_model(encoder: EncoderRuntime) -> None:
    """Where the number of partitions is known, a record of a user of another partition must be a dead letter."""
    run = faithful(encoder)
    rules = Rules(LIMITS.sequence_length, LIMITS.chunk_length, encoder.version, TOPIC, partitions=4)
    checker = Checker(rules, encoder)
    checker.feed(run.history)
    assert {Kind.DEAD_LETTER_MISSING, Kind.FOREIGN} <= set(checker.judge({0: run.committed}).kinds())
    assert {reason for reason, _ in checker.model.rejected.values()} >= {"wrong-partition"}


def test_what_was_judged_is_forgotten_and_what_follows_is_still_found(encoder: EncoderRuntime) -> None:
    """After `settle` a second judgement is clean and small, and later violations are still found."""
    run = faithful(encoder)
    rules = Rules(LIMITS.sequence_length, LIMITS.chunk_length, encoder.version, TOPIC)
    checker = Checker(rules, encoder)
    checker.feed(run.history)
    assert not checker.judge({0: run.committed}).violations
    checker.settle()
    again = checker.judge({0: run.committed})
    assert (again.violations, len(again.freshness_ms), len(checker.model.changes)) == ([], 0, 0)
    last = [record for record in run.history.outputs if record.key == b"ann"][-1]
    event = {"user_id": "bob", "item_id": "x", "action": "save", "timestamp_ms": NOW_MS + 990}
    unread = LogRecord(0, run.committed, NOW_MS + 1_000, b"bob", json.dumps(event).encode())
    checker.feed(History(inputs=[unread], outputs=[last]))
    kinds = set(checker.judge({0: run.committed}).kinds())
    assert {Kind.REPEATED, Kind.UNPROCESSED, Kind.UNPUBLISHED, Kind.LOST} <= kinds
