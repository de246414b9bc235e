"""What is trained on, and which later actions are asked for: no action that is asked for is ever trained on.

A question is "this row was the user's newest action: which item comes next?" Its answer is a later row. Three splits:

- `last`: some users give up their last action to validation; everything else is trained on, nothing is tested.
- `leave_one_out`: each user's last action is the test, the one before it validation (Kang, McAuley 2018).
- `time`: actions before a time are trained on; each later one, in two spans, is asked for after the one before it.

A log in shards is split shard by shard, by the same rules and at the same times; users of the first one are asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from encoder.arrays import I64, Bool
from encoder.data.log import ActionLog, ItemCounts
from encoder.data.shards import Shards
from encoder.features import UNKNOWN, Vocabularies

LAST_USERS_MAX = 2_000


@dataclass(frozen=True, slots=True)
class SplitConfig:
    """Which split, and how large its parts are."""

    kind: Literal["last", "leave_one_out", "time"] = "last"
    validation: float = 0.1
    """Share of the users ("last") or of the actions ("time") that validate."""
    test: float = 0.1
    """Share of the actions, the newest, that are the test of a split by "time"."""
    held_users: float = 0.0
    """Share of the users who are asked and of whom nothing is trained on, as published; 0 asks everybody."""
    items_min: int = 1
    """Actions on items that occur less often in the whole log are dropped before anything else."""
    questions_max: int = 20_000
    """Questions of each part; more are sampled down by the seed."""

    def __post_init__(self) -> None:
        if not (0 < self.validation < 1 and 0 < self.test < 1 and self.validation + self.test < 1):
            raise ValueError("split.validation and split.test must lie in (0, 1) and leave something to train on")
        if not 0 <= self.held_users < 1:
            raise ValueError("split.held_users must lie in [0, 1)")
        if min(self.questions_max, self.items_min) < 1:
            raise ValueError("split.questions_max and split.items_min must be at least 1")


@dataclass(frozen=True, slots=True)
class Questions:
    """Q pairs of rows of one log, ascending."""

    asked: I64
    """[Q] the newest action when the question is put."""
    answer: I64
    """[Q] the action that came."""

    def __len__(self) -> int:
        return len(self.asked)

    def select(self, chosen: Bool) -> Questions:
        return Questions(self.asked[chosen], self.answer[chosen])

    def known(self, log: ActionLog, vocabularies: Vocabularies) -> Questions:
        """The questions whose answer is an item of the vocabulary."""
        return self.select(vocabularies.item_rows(log.actions["item"][self.answer]) != UNKNOWN)


@dataclass(frozen=True, slots=True)
class Split:
    """A log and its parts."""

    log: ActionLog
    """Everything; questions are rows of it."""
    train: ActionLog
    validation: Questions
    test: Questions
    later_ms: int
    """From this event time on nothing is trained on or validated with."""


@dataclass(frozen=True, slots=True)
class ShardedSplit:
    """A log in shards and its parts, without a test."""

    log: ActionLog
    """Everything of the users who are asked; questions are rows of it."""
    train: TrainShards
    validation: Questions
    later_ms: int
    """From this event time on nothing is trained on or validated with."""


class TrainShards:
    """What is trained on of a log in shards: each is read and split when it is asked for. A `LogParts`."""

    def __init__(self, log: Shards, config: SplitConfig, *, seed: int) -> None:
        self._log, self._config, self._seed = log, config, seed
        self._frequent = None
        if config.items_min > 1:
            counts = ItemCounts.total(log.read(number).item_counts() for number in range(len(log)))
            self._frequent = counts.frequent(config.items_min)
        self._cuts = cut_times(self._read(0), config) if config.kind == "time" else None
        self._item_counts: dict[tuple[str, ...], ItemCounts] = {}

    @property
    def parts(self) -> int:
        return len(self._log)

    def part(self, number: int) -> ActionLog:
        return self.split(number).train

    def split(self, number: int) -> Split:
        """The parts of a shard."""
        rng = np.random.default_rng([self._seed, 0, number])
        return _split(self._read(number), self._config, rng, cuts=self._cuts, asks=number == 0)

    def _read(self, number: int) -> ActionLog:
        log = self._log.read(number)
        return log if self._frequent is None else log.with_items(self._frequent)

    def item_counts(self, names: tuple[str, ...] = ()) -> ItemCounts:
        if names not in self._item_counts:
            counts = (self.part(number).item_counts(names) for number in range(self.parts))
            self._item_counts[names] = ItemCounts.total(counts)
        return self._item_counts[names]

    def vocabularies(self, *, items_min: int = 1) -> Vocabularies:
        names = tuple(self._log.action_names), tuple(self._log.surface_names)
        return Vocabularies(self.item_counts().frequent(items_min), *names)

    def content(self) -> Iterator[bytes]:
        yield self._log.digest.encode()


def split_shards(log: Shards, config: SplitConfig, *, seed: int) -> ShardedSplit:
    """The parts of a log in shards; the same seed and shards give the same questions.

    Only users of the first shard validate, and a split by time cuts all shards where it would cut the first one: each
    is a sample of the users. Of "last" the others give up nothing.
    """
    train = TrainShards(log, config, seed=seed)
    first = train.split(0)
    user, answer = first.log.user_of_row, first.validation.answer
    rows = np.isin(user, user[answer])
    place = np.cumsum(rows) - 1
    validation = Questions(place[first.validation.asked], place[answer])
    later_ms = first.later_ms if config.kind == "time" else log.end_ms
    return ShardedSplit(first.log.select(rows), train, validation, later_ms)


def make_split(log: ActionLog, config: SplitConfig, *, seed: int) -> Split:
    """The parts of a log; the same seed gives the same questions."""
    return _split(log.with_frequent_items(config.items_min), config, np.random.default_rng([seed, 0]))


def cut_times(log: ActionLog, config: SplitConfig) -> tuple[int, int]:
    """Where a split by time begins to validate and to test."""
    return log.quantile_ms(1 - (config.test + config.validation)), log.quantile_ms(1 - config.test)


def _split(
    log: ActionLog,
    config: SplitConfig,
    rng: np.random.Generator,
    *,
    cuts: tuple[int, int] | None = None,
    asks: bool = True,
) -> Split:
    end_ms = int(log.actions["timestamp_ms"].max(initial=0)) + 1
    if config.kind == "leave_one_out":
        last = _rows_from_the_end(log, 1, at_least=3)
        before = _rows_from_the_end(log, 2, at_least=3)
        split = Split(log, _without(log, np.concatenate([last, before])), _next(before), _next(last), end_ms)
    elif config.kind == "time":
        split = _by_time(log, *(cuts or cut_times(log, config)))
    else:
        last = _rows_from_the_end(log, 1, at_least=3)
        asked = min(LAST_USERS_MAX, round(config.validation * len(last))) if asks else 0
        users = rng.permutation(len(last))[:asked]
        held = np.sort(last[users])
        split = Split(log, _without(log, held), _next(held), _next(held[:0]), end_ms)
    if config.held_users:
        split = _of_held_users(split, rng.random(len(log.users)) < config.held_users)
    validation, test = (_sampled(part, config.questions_max, rng) for part in (split.validation, split.test))
    return Split(split.log, split.train, validation, test, split.later_ms)


def _by_time(log: ActionLog, validation_ms: int, test_ms: int) -> Split:
    time_ms = log.actions["timestamp_ms"]
    follows = np.ones(len(log), np.bool_)
    follows[log.starts[:-1][np.diff(log.starts) > 0]] = False
    validation = np.flatnonzero(follows & (time_ms >= validation_ms) & (time_ms < test_ms))
    test = np.flatnonzero(follows & (time_ms >= test_ms))
    return Split(log, log.before(validation_ms), _next(validation), _next(test), test_ms)


def _of_held_users(split: Split, held: Bool) -> Split:
    """The questions of the users [U] that are True, and the training without them."""
    user = split.log.user_of_row
    validation, test = (part.select(held[user[part.answer]]) for part in (split.validation, split.test))
    return Split(split.log, split.train.select(~held[split.train.user_of_row]), validation, test, split.later_ms)


def _rows_from_the_end(log: ActionLog, place: int, *, at_least: int) -> I64:
    """Row `place` from the end (1 is the last) of each user with `at_least` actions."""
    return log.starts[1:][np.diff(log.starts) >= at_least] - place


def _next(answers: I64) -> Questions:
    return Questions(answers - 1, answers)


def _without(log: ActionLog, rows: I64) -> ActionLog:
    kept = np.ones(len(log), np.bool_)
    kept[rows] = False
    return log.select(kept)


def _sampled(questions: Questions, most: int, rng: np.random.Generator) -> Questions:
    chosen = np.zeros(len(questions), np.bool_)
    chosen[rng.permutation(len(questions))[:most]] = True
    return questions.select(chosen)
