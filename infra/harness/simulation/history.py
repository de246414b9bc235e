"""Histories: what happens to the partitions of one application, as data. A fault is a step like any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from streams.core.policy import Reason, TriggerPolicy


@dataclass(frozen=True)
class Act:
    """A user acts, and the event arrives in order."""

    user: int
    strong: bool = False


@dataclass(frozen=True)
class Late:
    """An event arrives `behind_ms` late."""

    user: int
    behind_ms: int


@dataclass(frozen=True)
class Duplicate:
    """A producer sends its `back`-th last event again."""

    back: int


@dataclass(frozen=True)
class Tombstone:
    """A tombstone arrives: the user is to be forgotten."""

    user: int


@dataclass(frozen=True)
class Poison:
    """A record arrives that is not an action."""

    kind: int


@dataclass(frozen=True)
class InTransaction:
    """A transactional producer sends an action; nobody may read it before its transaction ends."""

    user: int


@dataclass(frozen=True)
class EndTransactions:
    """The transactional producer commits or aborts."""

    commit: bool


@dataclass(frozen=True)
class Poll:
    """The worker fetches records, which wait for its agent."""

    records: int


@dataclass(frozen=True)
class LostFetch:
    """The worker fetches records that never reach its agent."""

    records: int


@dataclass(frozen=True)
class Redeliver:
    """The agent receives the last records of a partition once more, perhaps with newer ones behind them."""

    partition: int
    records: int


@dataclass(frozen=True)
class Silence:
    """Nothing arrives for a while; timers fire when they are due."""

    ms: int


@dataclass(frozen=True)
class ClockJump:
    """The worker's clock is set forward or back."""

    ms: int


@dataclass(frozen=True)
class Encode:
    """The encoder ends some calls."""

    calls: int


@dataclass(frozen=True)
class EncoderFails:
    """The next calls of the encoder fail."""

    calls: int


@dataclass(frozen=True)
class BadUser:
    """From now on the encoder fails on a user, or no longer does."""

    user: int
    is_bad: bool


@dataclass(frozen=True)
class Deliver:
    """The broker receives the oldest outputs in flight."""

    outputs: int


@dataclass(frozen=True)
class Acknowledge:
    """The broker acknowledges every output it has received."""


@dataclass(frozen=True)
class Refuse:
    """The oldest output in flight fails, in one of several ways."""

    kind: int


@dataclass(frozen=True)
class Checkpoint:
    """The worker begins to make its state durable."""


@dataclass(frozen=True)
class Commit:
    """The broker performs and acknowledges steps of checkpoints."""

    steps: int


@dataclass(frozen=True)
class FailCheckpoint:
    """The oldest step of a checkpoint in flight fails, in one of several ways."""

    kind: int


@dataclass(frozen=True)
class DiskFull:
    """The next writes of the worker's stores fail."""

    writes: int


@dataclass(frozen=True)
class TornCheckpoint:
    """The worker dies right before side effect number `step` of a checkpoint; its store loses the last writes."""

    step: int
    lost_writes: int = 0


@dataclass(frozen=True)
class Crash:
    """The worker dies and starts again; its store loses the last writes."""

    lost_writes: int = 0


@dataclass(frozen=True)
class TornRestore:
    """The worker dies, and dies again right before write number `step` of its restore."""

    step: int


@dataclass(frozen=True)
class Rebalance:
    """Another worker takes over. The old one gives its partitions back, or freezes with everything in flight."""

    in_order: bool
    old_disk: bool
    """Whether the new one has the disk of a former owner."""


@dataclass(frozen=True)
class Reassign:
    """The worker loses its partitions to another one, which polls, and gets them back."""

    records: int


@dataclass(frozen=True)
class Wake:
    """A frozen worker wakes, and everything that it had in flight arrives."""


@dataclass(frozen=True)
class Compaction:
    """The broker compacts the changelog."""

    drop_tombstones: bool = False


@dataclass(frozen=True)
class NewRelease:
    """The worker restarts with another encoder."""


@dataclass(frozen=True)
class ForeignSource:
    """The worker restarts on a source topic that was created again and has grown; then the old one is brought back."""


@dataclass(frozen=True)
class LostChangelog:
    """The changelog is created again and the group's offsets are deleted, while the worker's disk stays."""


Step = (
    Act | Late | Duplicate | Tombstone | Poison | InTransaction | EndTransactions | Poll | LostFetch | Redeliver
    | Silence | ClockJump | Encode | EncoderFails | BadUser | Deliver | Acknowledge | Refuse | Checkpoint | Commit
    | FailCheckpoint | DiskFull | TornCheckpoint | Crash | TornRestore | Rebalance | Reassign | Wake | Compaction
    | NewRelease | ForeignSource | LostChangelog
)  # fmt: skip

USERS = 8
POISONS = 6
REFUSALS = 4

_KINDS: list[tuple[float, Callable[[Random], Step]]] = [
    (30, lambda r: Act(r.randrange(USERS), r.random() < 0.2)),
    (8, lambda r: Late(r.randrange(USERS), r.choice([0, 5, 40, 300, 5_000, 3_590_000]))),
    (4, lambda r: Duplicate(r.randrange(1, 12))),
    (2, lambda r: Tombstone(r.randrange(USERS))),
    (2, lambda r: Poison(r.randrange(POISONS))),
    (3, lambda r: InTransaction(r.randrange(USERS))),
    (2, lambda r: EndTransactions(r.random() < 0.6)),
    (20, lambda r: Poll(r.choice([1, 2, 5, 30]))),
    (1, lambda r: LostFetch(r.choice([1, 5]))),
    (2, lambda r: Redeliver(r.randrange(2), r.randrange(1, 10))),
    (6, lambda r: Silence(r.choice([1, 1, 50, 50, 150, 150, 1_000, 1_000, 4_000, 4_000, 50_000]))),
    (1, lambda r: ClockJump(r.choice([-3_000, -100, 100, 3_000]))),
    (14, lambda r: Encode(r.choice([1, 3, 30]))),
    (1, lambda r: EncoderFails(r.choice([1, 2, 3]))),
    (1, lambda r: BadUser(r.randrange(USERS), r.random() < 0.5)),
    (9, lambda r: Deliver(r.choice([1, 2, 30]))),
    (9, lambda _: Acknowledge()),
    (2, lambda r: Refuse(r.randrange(REFUSALS))),
    (7, lambda _: Checkpoint()),
    (12, lambda r: Commit(r.choice([1, 1, 2, 30]))),
    (1, lambda r: FailCheckpoint(r.randrange(REFUSALS - 1))),
    (0.3, lambda r: DiskFull(r.choice([1, 3]))),
    (3, lambda r: TornCheckpoint(r.randrange(12), r.choice([0, 0, 1, 3]))),
    (2, lambda r: Crash(r.choice([0, 0, 1, 4]))),
    (1, lambda r: TornRestore(r.randrange(4))),
    (2, lambda r: Rebalance(r.random() < 0.5, r.random() < 0.5)),
    (0.5, lambda r: Reassign(r.choice([0, 5]))),
    (2, lambda _: Wake()),
    (2, lambda r: Compaction(r.random() < 0.5)),
    (1, lambda _: NewRelease()),
    (0.4, lambda _: ForeignSource()),
    (0.4, lambda _: LostChangelog()),
]


@dataclass(frozen=True)
class History:
    """A policy, and the steps that happen under it."""

    policy: TriggerPolicy
    steps: tuple[Step, ...]
    partitions: int = 1
    wait_ms: int = 0
    """Time for which a micro-batch gathers users."""
    features: bool = False
    """Whether the workers compute features, too."""
    refresh_ms: int = 0
    """Least time between two refreshes of a user's features; 0 for no refresh."""
    user_ttl_ms: int = 0
    """Time without an action after which a user is forgotten; 0 for never."""


def random_history(rng: Random, steps: int) -> History:
    """Return a history of `steps` steps; the same generator state gives the same history."""
    weights = [weight for weight, _ in _KINDS]
    makers = rng.choices([make for _, make in _KINDS], weights, k=steps)
    partitions, wait_ms = rng.choice([1, 2, 2]), rng.choice([0, 0, 100])
    policy, made = random_policy(rng), tuple(make(rng) for make in makers)
    features, refresh_ms = rng.random() < 0.6, rng.choice([0, 200, 1_500])
    user_ttl_ms = rng.choice([0, 0, 0, 15_000])
    if user_ttl_ms:
        # An expiry has no event of its own. Where a crash leaves its tombstone in one topic only, and undoes it, a
        # refresh may publish the user once more at the offset before the tombstone's, until it is forgotten again.
        refresh_ms = 0
    return History(policy, made, partitions, wait_ms, features, refresh_ms, user_ttl_ms)


def random_policy(rng: Random) -> TriggerPolicy:
    """Return a policy under which every action is encoded eventually."""
    priorities = list(Reason)
    rng.shuffle(priorities)
    every_n = rng.choice([1, 1, 3, 0])
    timers = [(2_000, 0), (0, 1_500), (0, 3_000), (2_000, 1_500)]
    max_staleness_ms, session_gap_ms = rng.choice([*timers, (0, 0)] if every_n == 1 else timers)
    return TriggerPolicy(
        every_n=every_n,
        strong=frozenset({"buy"}) if rng.random() < 0.5 else frozenset(),
        first_n=rng.choice([0, 2]),
        max_staleness_ms=max_staleness_ms,
        session_gap_ms=session_gap_ms,
        cooldown_ms=rng.choice([0, 0, 300]),
        spread_ms=rng.choice([0, 400]),
        priorities=tuple(priorities),
    )


def shrink(history: History, fails: Callable[[History], bool]) -> History:
    """Remove steps while the history still fails, first many at a time, in the end one by one."""
    steps, size = history.steps, max(len(history.steps) // 2, 1)
    while size:
        begin = 0
        while begin < len(steps):
            shorter = steps[:begin] + steps[begin + size :]
            if fails(replace(history, steps=shorter)):
                steps = shorter
            else:
                begin += size
        size //= 2
    return replace(history, steps=steps)
