"""Judge a run by its topics: compare the changelog and the output topic with what the input topic demands.

    checker = Checker(rules, encoder)
    checker.feed(history)                # records appended since the last call, at rest or not
    verdict = checker.judge(committed)   # only at rest: every event is processed, and no worker writes

The model recomputes every user from the input topic. Compared with it are:

- every checkpoint: the state of each user it touched, as of the source offset that its mark names;
- the final state: no action is lost, doubled or swapped;
- every output record: its headers must have been true at its source offset;
- every features record: its headers, and its values, those of every record for a sample of users;
- the last embedding of each user, and every embedding of a sample of users: it must equal the one computed from the
  full history;
- forgotten users: no chunk of their actions is left;
- the dead letters and the committed offsets.

Stale and repeated outputs are violations unless they fall into a time in which a fault explains them; those are only
counted. A violation names what is wrong, whose record it is, and where.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from encoder.inference import EncoderRuntime
from infra.chaos.checks.features import FeatureChecks
from infra.chaos.checks.outputs import OutputChecks
from infra.chaos.checks.state import StateChecks
from infra.chaos.checks.violations import Explained, Kind, Violation
from infra.harness.feature_files import FeatureRules
from infra.harness.history import History, LogRecord
from infra.harness.model import Model
from streams.core.features.partition import FeatureConfig


@dataclass(frozen=True, slots=True)
class Rules:
    """Settings of the run that the checks depend on."""

    sequence_length: int
    chunk_length: int
    encoder_version: str
    source_topic: str
    sample_every: int = 0
    """Number N such that every embedding of one user in N is recomputed, and only the last of the others; 0: none."""
    explained: Sequence[Explained] = ()
    """Times in which outputs may be stale or repeated: a frozen worker woke up, or acknowledgements were lost."""
    partitions: int = 0
    """Number of partitions; with 0, records in the partition of another user are not noticed."""
    features: FeatureRules | None = None
    """None if no features are computed."""
    feature_config: FeatureConfig | None = None
    """What reads the stored features."""


@dataclass(slots=True)
class Verdict:
    """Result of a judgement; `violations` is empty when every invariant held."""

    violations: list[Violation]
    counts: Counter[str] = field(default_factory=Counter)
    """Totals: events, users, checkpoints, embeddings, explained stale and repeated outputs, ..."""
    freshness_ms: Sequence[float] = ()
    """Time from the arrival of each applied action in the log to the first embedding that contains it."""

    def kinds(self) -> Counter[Kind]:
        """Count the violations by kind."""
        return Counter(violation.kind for violation in self.violations)


class Checker:
    """Compares topics with the model, as they grow."""

    def __init__(self, rules: Rules, encoder: EncoderRuntime | None) -> None:
        self.model = Model(
            rules.sequence_length,
            rules.sample_every,
            rules.partitions,
            has_features=rules.features is not None,
        )
        self._rules = rules
        self._state = StateChecks(self.model, sequence_length=rules.sequence_length, chunk_length=rules.chunk_length)
        self._outputs = OutputChecks(self.model, rules.encoder_version, encoder, rules.explained)
        self._features: FeatureChecks | None = None
        if rules.features is not None and rules.feature_config is not None:
            self._features = FeatureChecks(
                self.model, self._state, rules.features, rules.feature_config, rules.explained
            )
        self._dead: dict[tuple[int, int], list[LogRecord]] = {}
        self._records: Counter[str] = Counter()
        self._violations: list[Violation] = []
        self._settled: dict[int, int] = {}
        """Offset up to which the input has been judged and dropped, by partition."""

    def feed(self, history: History) -> None:
        """Add records of each topic; `inputs` must reach at least as far as the topics derived from it."""
        self.model.feed(history.inputs)
        self._violations += self._state.feed(history.changelog)
        self._violations += self._outputs.feed(history.outputs)
        if self._features:
            self._violations += self._features.feed(history.features)
        for record in history.dead_letters:
            self._feed_dead_letter(record)
        self._records.update(
            changelog_records=len(history.changelog),
            output_records=len(history.outputs) + len(history.features),
            dead_letters=len(history.dead_letters),
        )

    def is_behind(self) -> bool:
        """Return whether some user's last change is not in the output topic yet."""
        behind = chain(self._outputs.behind(), self._features.behind() if self._features else ())
        return next(behind, None) is not None

    def judge(self, committed: Mapping[int, int]) -> Verdict:
        """Compare everything at rest; `committed` is the group's offset by partition."""
        violations = [
            *self._violations,
            *self._state.at_rest(),
            *self._outputs.at_rest(),
            *(self._features.at_rest() if self._features else ()),
            *self._dead_letters_at_rest(),
            *self._commits(committed),
        ]
        counts = Counter(
            {
                **self._records,
                "events": self.model.events,
                "users": len(self.model.users),
                "rejected": len(self.model.rejected),
                "checkpoints": self._state.checkpoints,
                **self._outputs.counts,
                **(self._features.counts if self._features else {}),
            }
        )
        return Verdict(violations, counts, self._outputs.freshness_ms())

    def settle(self) -> None:
        """Keep the present state of every user and drop the history that led to it; after a judgement at rest."""
        self._settled = dict(self.model.ends)
        self._state.settle()
        self._outputs.settle()
        if self._features:
            self._features.settle()
        self.model.settle()
        self._dead.clear()
        self._violations.clear()

    def move(self, partition: int, to: int, offset_max: int) -> None:
        """Expect that an operator continues a partition at another offset; after `settle`, before the move is read.

        `offset_max` is the last offset of users and outputs that still means something: `to` - 1 after a truncation, -1
        in another log.
        """
        self._settled[partition] = to
        self.model.move(partition, to, offset_max)
        self._state.move(partition, to)
        self._outputs.move(partition, offset_max)
        if self._features:
            self._features.move(partition, offset_max)

    def _commits(self, committed: Mapping[int, int]) -> list[Violation]:
        """Committed offsets are never ahead of the state, and at rest not behind the log either."""
        found = []
        for partition, end in self.model.ends.items():
            offset = committed.get(partition, 0)
            marked = self._state.marks.get(partition, 0)
            if offset != marked:
                kind = Kind.COMMITTED_AHEAD if offset > marked else Kind.COMMITTED_BEHIND
                found.append(Violation(kind, None, partition, offset, f"the last mark names {marked}"))
            if offset < end:
                found.append(Violation(Kind.UNPROCESSED, None, partition, offset, f"the log ends at {end}"))
        return found

    def _feed_dead_letter(self, record: LogRecord) -> None:
        headers = dict(record.headers)
        if headers.get("source-topic") == self._rules.source_topic.encode() and "source-offset" in headers:
            partition, offset = int(headers.get("source-partition", b"-1")), int(headers["source-offset"])
            if offset >= self._settled.get(partition, 0):
                self._dead.setdefault((partition, offset), []).append(record)

    def _dead_letters_at_rest(self) -> list[Violation]:
        found = []
        for (partition, offset), (reason, record) in self.model.rejected.items():
            letters = self._dead.get((partition, offset), [])
            if not letters:
                found.append(Violation(Kind.DEAD_LETTER_MISSING, record.key, partition, offset, reason))
            for letter in letters:
                if problem := _difference(letter, record, reason):
                    found.append(Violation(Kind.DEAD_LETTER_WRONG, record.key, partition, offset, problem))
        for (partition, offset), (letter, *_) in self._dead.items():
            is_rejected = (partition, offset) in self.model.rejected
            if not is_rejected and dict(letter.headers).get("error-reason") != b"encoder-failed":
                found.append(Violation(Kind.DEAD_LETTER_WRONG, letter.key, partition, offset, "the action is valid"))
        return found


def _difference(letter: LogRecord, record: LogRecord, reason: str) -> str:
    """Describe how a dead letter differs from what it must be; empty if it does not."""
    if (letter.key, letter.value) != (record.key, record.value):
        return "key or value differ from the received bytes"
    reported = dict(letter.headers).get("error-reason", b"").decode()
    if reported != reason:
        return f"error-reason is {reported!r}, must be {reason!r}"
    return "" if set(record.headers) <= set(letter.headers) else "headers of the rejected record are missing"
