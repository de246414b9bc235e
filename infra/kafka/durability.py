"""What is too weak for "nothing is lost": findings about topics that work, but would lose records in a failure.

A worker runs on such topics and logs a warning per finding; `streamformer topics verify --strict` takes findings for
errors. What cannot be read for lack of a right is listed as assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from streams.config.settings import Settings

DAY_MS = 86_400_000
INTERNAL_TOPICS = ("__consumer_offsets", "__transaction_state")
"""Kafka's own topics that checkpoints are written to."""
HARD_TO_COMPACT = 0.9
"""Share of outdated records in a log from which on a changelog is nearly never compacted."""


@dataclass(frozen=True, slots=True)
class TopicFacts:
    """What the broker reports about a topic."""

    name: str
    partitions: int
    replicas: int
    """Number of replicas of the partition that has the fewest."""
    configs: Mapping[str, str]
    """Effective values; empty where this user has no right to read them."""

    def number(self, config: str, default: float) -> float:
        """Return a numeric value, or the default where it cannot be read."""
        return float(self.configs.get(config, default))


@dataclass(frozen=True, slots=True)
class Findings:
    """Findings that do not keep a worker from running, one line each."""

    weak: list[str] = field(default_factory=list)
    """What may lose records, with the remedy."""
    assumed: list[str] = field(default_factory=list)
    """What could not be verified, with the right that is missing."""
    inexact: list[str] = field(default_factory=list)
    """What makes a figure less exact; nothing is lost by it."""

    def lines(self) -> list[str]:
        """Return all findings as text."""
        weak = [f'too weak for "nothing is lost": {line}' for line in self.weak]
        assumed = [f"not verified: {line}" for line in self.assumed]
        return [*weak, *assumed, *(f"less exact: {line}" for line in self.inexact)]

    @property
    def count(self) -> int:
        """Number of findings that `topics verify --strict` takes for errors."""
        return len(self.weak) + len(self.assumed)


def findings(settings: Settings, facts: Mapping[str, TopicFacts]) -> Findings:
    """Return what is weak or assumed about the topics that exist and can be described."""
    names = settings.topics
    ours = [facts[name] for name in _ours(settings) if name in facts]
    weak = [*_copies([*ours, *(facts[name] for name in INTERNAL_TOPICS if name in facts)])]
    if names.actions in facts:
        weak += _retention(facts[names.actions])
    if names.actions in facts and names.dead_letter in facts:
        weak += _sizes(facts[names.actions], facts[names.dead_letter])
    if settings.changelog_topic in facts:
        weak += _compaction(facts[settings.changelog_topic])
    unread = [each.name for each in ours if not each.configs]
    assumed = [
        f"no right to read the settings of {', '.join(unread)}: grant DESCRIBE_CONFIGS on them; their cleanup.policy "
        "and limits are assumed to be right"
    ]
    inexact = _times(facts[names.actions]) if names.actions in facts else ()
    return Findings(weak, assumed if unread else [], list(inexact))


def _ours(settings: Settings) -> tuple[str, ...]:
    names = settings.topics
    return names.actions, names.embeddings, names.dead_letter, settings.changelog_topic


def _copies(topics: Collection[TopicFacts]) -> Iterator[str]:
    """Yield what the loss of one broker would take along."""
    yield from _finding(
        topics,
        lambda topic: topic.replicas == 1,
        "one replica, so the loss of one disk loses records",
        "create topics with --replication-factor 3, or reassign the partitions",
    )
    yield from _finding(
        topics,
        lambda topic: topic.replicas > 1 and topic.number("min.insync.replicas", topic.replicas) < 2,
        "min.insync.replicas=1, so a record may be acknowledged that only one broker holds",
        "set min.insync.replicas=2",
    )
    yield from _finding(
        topics,
        lambda topic: topic.number("min.insync.replicas", 1) > topic.replicas,
        "min.insync.replicas above the number of replicas, so no record is accepted",
        "lower it, or add replicas",
    )
    yield from _finding(
        topics,
        lambda topic: topic.configs.get("unclean.leader.election.enable") == "true",
        "unclean.leader.election.enable=true, so an election may drop acknowledged records",
        "set it to false",
    )


def _finding(
    topics: Collection[TopicFacts], is_weak: Callable[[TopicFacts], bool], what: str, remedy: str
) -> Iterator[str]:
    if weak := [topic.name for topic in topics if is_weak(topic)]:
        yield f"{', '.join(weak)} {'have' if len(weak) > 1 else 'has'} {what}: {remedy}"


def _retention(actions: TopicFacts) -> Iterator[str]:
    """Yield why events may be deleted before they are read."""
    retention_ms = actions.number("retention.ms", -1)
    if 0 <= retention_ms < DAY_MS:
        hours = retention_ms / 3_600_000
        yield (
            f"{actions.name} keeps events for {hours:g} h, and a worker that is down for longer loses them: "
            "raise retention.ms"
        )
    if actions.number("retention.bytes", -1) >= 0:
        size = int(actions.number("retention.bytes", -1))
        yield (
            f"{actions.name} has retention.bytes={size}, so a burst may delete events before they are read: "
            "limit it by time only (retention.bytes=-1)"
        )


def _times(actions: TopicFacts) -> Iterator[str]:
    """Yield why latency cannot be measured from the broker's time."""
    if actions.configs.get("message.timestamp.type") == "CreateTime":
        yield (
            f"{actions.name} has message.timestamp.type=CreateTime, so a record has the time of its producer: latency "
            "counts from when a worker has read the record, and a deletion has the producer's time; set "
            "message.timestamp.type=LogAppendTime"
        )


def _sizes(actions: TopicFacts, dead_letter: TopicFacts) -> Iterator[str]:
    """Yield why a rejected record may not fit."""
    accepted, room = actions.number("max.message.bytes", 0), dead_letter.number("max.message.bytes", float("inf"))
    if accepted >= room:
        yield (
            f"{dead_letter.name} accepts {int(room)} bytes and {actions.name} {int(accepted)}, so the value of a large "
            "rejected record is left out of its dead letter: raise max.message.bytes of the former"
        )


def _compaction(changelog: TopicFacts) -> Iterator[str]:
    """Yield why restores may read far more than the state."""
    if changelog.number("min.cleanable.dirty.ratio", 0) >= HARD_TO_COMPACT:
        yield f"{changelog.name} is nearly never compacted, and restores grow: lower min.cleanable.dirty.ratio to 0.5"
