"""Compare the output topic with the model: each record as it is published, and each user's last record at rest."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from encoder.actions.columns import ACTION_DTYPE, Actions, SequenceBatch
from encoder.arrays import F32
from encoder.inference import EncoderRuntime
from infra.chaos.checks.violations import Explained, Kind, Violation, is_explained
from infra.harness.history import LogRecord
from infra.harness.model import Model, UserVersion

COSINE_MIN = 0.9999
USERS_AT_ONCE = 64


@dataclass(slots=True)
class _Published:
    """Outputs of one user; stale records are dropped, as a subscriber drops them."""

    source_offset: int = -1
    vector: F32 | None = None
    """Last embedding; None after a tombstone."""
    firsts: list[tuple[int, int]] = field(default_factory=list)
    """Source offset and publish time of each record that was not stale, ascending in both."""


@dataclass(frozen=True, slots=True)
class _Sampled:
    """An embedding of a sampled user, to be recomputed."""

    name: bytes
    partition: int
    offset: int
    version: UserVersion
    vector: F32


class OutputChecks:
    """Follows the output topic; `encoder` recomputes embeddings, and without one vectors are not checked."""

    def __init__(
        self, model: Model, encoder_version: str, encoder: EncoderRuntime | None, explained: Sequence[Explained]
    ) -> None:
        self._model, self._version, self._encoder, self._explained = model, encoder_version, encoder, explained
        self._users: dict[bytes, _Published] = defaultdict(_Published)
        self.counts: Counter[str] = Counter()
        self._sample: list[_Sampled] = []
        self._source_ids: dict[int, bytes] = {}
        """Log that the outputs of a partition name."""
        self._past_ids: set[tuple[int, bytes]] = set()
        """Logs that they named before an operator's move, by partition."""

    def feed(self, records: Iterable[LogRecord]) -> list[Violation]:
        """Check output records, in order."""
        found: list[Violation] = []
        for record in records:
            found += self._record(record)
        return found

    def _record(self, record: LogRecord) -> Iterator[Violation]:
        headers = dict(record.headers)
        name, offset = record.key or b"", int(headers.get("source-offset", b"-1"))
        source_id = headers.get("source-id", b"")
        problem = self._untruth(name, offset, record.value, headers) or self._other_log(record.partition, source_id)
        if problem:
            yield Violation(Kind.WRONG_OUTPUT, name, record.partition, offset, problem)
            return
        self.counts["tombstones" if record.value is None else "embeddings"] += 1
        if record.value is not None and self._model.is_sampled(name):
            version = self._model.users[name].versions[offset]
            self._sample.append(_Sampled(name, record.partition, offset, version, np.frombuffer(record.value, "<f4")))
        published = self._users[name]
        if offset <= published.source_offset:
            yield from self._again(record, name, offset, published.source_offset)
        if offset >= published.source_offset:
            published.vector = None if record.value is None else np.frombuffer(record.value, "<f4")
        if offset > published.source_offset:
            published.source_offset = offset
            published.firsts.append((offset, record.timestamp_ms))

    def _untruth(self, name: bytes, offset: int, value: bytes | None, headers: dict[str, bytes]) -> str:
        """Describe a header that was not true at the record's source offset; empty if all were true."""
        user = self._model.users.get(name)
        if user is None:
            return "the input has no action of this user"
        if value is None:
            return "" if offset in user.tombstones else "no tombstone has this source offset"
        version = user.versions.get(offset)
        if version is None or offset in user.tombstones:
            return "no applied action of the user has this source offset"
        if headers.get("encoder-version") != self._version.encode():
            return f"encoder version {headers.get('encoder-version')!r} is not the loaded one"
        found = int(headers["event-time-ms"]), int(headers["sequence-length"])
        must = version.newest_ms, version.length
        return "" if found == must else f"event-time-ms and sequence-length are {found}, must be {must}"

    def _other_log(self, partition: int, source_id: bytes) -> str:
        """Describe a header that names another log than the outputs before it, or one of before a move."""
        known = self._source_ids.setdefault(partition, source_id)
        if source_id == known and (partition, source_id) not in self._past_ids:
            return ""
        return f"the header source-id is {source_id!r}, and the log is another"

    def move(self, partition: int, offset_max: int) -> None:
        """Lower the source offsets of a partition's outputs, whose log an operator has changed."""
        if partition in self._source_ids:
            self._past_ids.add((partition, self._source_ids.pop(partition)))
        for name, published in self._users.items():
            if name in self._model.users and self._model.users[name].partition == partition:
                published.source_offset = min(published.source_offset, offset_max)
                published.firsts.clear()

    def _again(self, record: LogRecord, name: bytes, offset: int, newest: int) -> Iterator[Violation]:
        """A record that is not newer is a violation unless a fault explains it.

        A tombstone goes to two topics where there are features. A worker that finds it in one of them only cannot
        know that it is in the other one too, and repeats it in both.
        """
        if record.value is None and offset == newest and self._model.has_features:
            self.counts["tombstones_again"] += 1
            return
        kind = Kind.REPEATED if offset == newest else Kind.STALE
        if is_explained(record.timestamp_ms, self._explained):
            self.counts[f"explained_{kind}"] += 1
            return
        detail = f"published at {record.timestamp_ms} ms after source offset {newest}"
        yield Violation(kind, name, record.partition, offset, detail)

    def behind(self) -> Iterator[Violation]:
        """Yield users whose last output lacks their last change, and forgotten users that still have an output."""
        for name, user in self._model.users.items():
            newest = self._users[name].source_offset if name in self._users else -1
            if newest < user.applied_offset:
                kind = Kind.UNPUBLISHED if user.rows else Kind.RESURRECTED
                detail = f"the last output has source offset {newest}"
                yield Violation(kind, name, user.partition, user.applied_offset, detail)

    def at_rest(self) -> Iterator[Violation]:
        """Each user's last output contains the last change, and equals the embedding of the full history."""
        behind = list(self.behind())
        yield from behind
        late = {violation.user for violation in behind}
        current = [name for name, user in self._model.users.items() if user.rows and name not in late]
        for begin in range(0, len(current), USERS_AT_ONCE):
            yield from self._recompute(current[begin : begin + USERS_AT_ONCE])
        for begin in range(0, len(self._sample), USERS_AT_ONCE):
            yield from self._recompute_sample(self._sample[begin : begin + USERS_AT_ONCE])

    def _recompute(self, names: Sequence[bytes]) -> Iterator[Violation]:
        if self._encoder is None:
            return
        users = [self._model.users[name] for name in names]
        expected = self._encoder.embed(_sequences([(user.actions(), user.count) for user in users]))
        for name, vector in zip(names, expected, strict=True):
            user, found = self._model.users[name], self._users[name].vector
            cosine = _cosine(found, vector)
            self.counts["recomputed"] += 1
            if not cosine >= COSINE_MIN:
                detail = f"cosine {cosine:.6f} to the embedding of the full history"
                yield Violation(Kind.WRONG_EMBEDDING, name, user.partition, user.applied_offset, detail)

    def _recompute_sample(self, sample: Sequence[_Sampled]) -> Iterator[Violation]:
        if self._encoder is None:
            return
        rows = [(np.array([*one.version.rows], ACTION_DTYPE), one.version.count) for one in sample]
        for one, vector in zip(sample, self._encoder.embed(_sequences(rows)), strict=True):
            cosine = _cosine(one.vector, vector)
            self.counts["recomputed_of_sample"] += 1
            if not cosine >= COSINE_MIN:
                detail = f"cosine {cosine:.6f} to the embedding of the history at its source offset"
                yield Violation(Kind.WRONG_EMBEDDING, one.name, one.partition, one.offset, detail)

    def settle(self) -> None:
        """Drop every output but each user's last."""
        self._sample.clear()
        for published in self._users.values():
            del published.firsts[:-1]

    def freshness_ms(self) -> list[float]:
        """Return, for each applied action, the time from its arrival to the first output that contains it."""
        ages: list[float] = []
        for name, published in self._users.items():
            user = self._model.users[name]
            offsets = [offset for offset, _ in published.firsts]
            for offset in user.versions:
                arrived_ms = self._model.arrived_ms.get((user.partition, offset))
                at = bisect_left(offsets, offset)
                if arrived_ms is not None and at < len(offsets):
                    ages.append(max(0, published.firsts[at][1] - arrived_ms))
        return ages


def _sequences(histories: Sequence[tuple[Actions, int]]) -> SequenceBatch:
    """Return kept actions and counts as a batch; its users are numbered, because a user may be in it twice."""
    return SequenceBatch(
        users=[b"%d" % number for number in range(len(histories))],
        actions=np.concatenate([actions for actions, _ in histories]),
        starts=np.cumsum([0, *(len(actions) for actions, _ in histories)]).astype(np.int64),
        counts=np.array([count for _, count in histories], np.int64),
        revisions=np.zeros(len(histories), np.int64),
    )


def _cosine(a: F32 | None, b: F32) -> float:
    if a is None or a.shape != b.shape:
        return 0.0
    return float(a @ b) / max(float(np.linalg.norm(a)) * float(np.linalg.norm(b)), 1e-12)
