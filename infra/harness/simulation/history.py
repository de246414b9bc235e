"""Histories: what happens to one partition, as data. A fault is a step like any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
class Poll:
    """The worker fetches and applies the next records."""

    records: int


@dataclass(frozen=True)
class Redeliver:
    """The worker receives its last records once more."""

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
    """The encoder takes users from the queue."""

    users: int


@dataclass(frozen=True)
class Publish:
    """The worker hands the oldest encoded job to its producer."""


@dataclass(frozen=True)
class Deliver:
    """The broker receives the oldest outputs in flight."""

    outputs: int


@dataclass(frozen=True)
class Acknowledge:
    """The broker acknowledges every output it has received."""


@dataclass(frozen=True)
class Shed:
    """The queue sheds its least valuable user."""

    delay_ms: int


@dataclass(frozen=True)
class Checkpoint:
    """The worker makes its state durable."""


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
    """Another worker takes over; the old one, checkpointed or not, still tries to write."""

    checkpointed: bool
    keeps_disk: bool


@dataclass(frozen=True)
class Compaction:
    """The broker compacts the changelog."""


@dataclass(frozen=True)
class NewRelease:
    """The worker restarts with another encoder."""


Step = (
    Act | Late | Duplicate | Tombstone | Poison | Poll | Redeliver | Silence | ClockJump | Encode | Publish | Deliver
    | Acknowledge | Shed | Checkpoint | TornCheckpoint | Crash | TornRestore | Rebalance | Compaction | NewRelease
)  # fmt: skip

USERS = 6

_KINDS: list[tuple[int, Callable[[Random], Step]]] = [
    (30, lambda r: Act(r.randrange(USERS), r.random() < 0.2)),
    (8, lambda r: Late(r.randrange(USERS), r.choice([0, 5, 40, 300, 5_000]))),
    (4, lambda r: Duplicate(r.randrange(1, 12))),
    (2, lambda r: Tombstone(r.randrange(USERS))),
    (2, lambda r: Poison(r.randrange(5))),
    (18, lambda r: Poll(r.choice([1, 2, 5, 30]))),
    (2, lambda r: Redeliver(r.randrange(1, 10))),
    (6, lambda r: Silence(r.choice([1, 50, 150, 1_000, 4_000]))),
    (1, lambda r: ClockJump(r.choice([-3_000, -100, 100, 3_000]))),
    (9, lambda r: Encode(r.choice([1, 3, 30]))),
    (6, lambda _: Publish()),
    (5, lambda r: Deliver(r.choice([1, 2, 30]))),
    (6, lambda _: Acknowledge()),
    (1, lambda r: Shed(r.choice([0, 500]))),
    (6, lambda _: Checkpoint()),
    (3, lambda r: TornCheckpoint(r.randrange(9), r.choice([0, 0, 1, 3]))),
    (2, lambda r: Crash(r.choice([0, 0, 1, 4]))),
    (1, lambda r: TornRestore(r.randrange(4))),
    (2, lambda r: Rebalance(r.random() < 0.7, r.random() < 0.5)),
    (2, lambda _: Compaction()),
    (1, lambda _: NewRelease()),
]


@dataclass(frozen=True)
class History:
    """A policy, and the steps that happen under it."""

    policy: TriggerPolicy
    steps: tuple[Step, ...]


def random_history(rng: Random, steps: int) -> History:
    """Return a history of `steps` steps; the same generator state gives the same history."""
    weights = [weight for weight, _ in _KINDS]
    makers = rng.choices([make for _, make in _KINDS], weights, k=steps)
    return History(random_policy(rng), tuple(make(rng) for make in makers))


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
            if fails(History(history.policy, shorter)):
                steps = shorter
            else:
                begin += size
        size //= 2
    return History(history.policy, steps)
