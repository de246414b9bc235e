"""Splits of a log: the actions to train on, and the later actions to predict, which are never trained on.

A query is "this row was the user's newest action: which item comes next?", and its target is a later row. There are
three splits:

- `last`: a sample of users validate with their last action; everything else is trained on and there is no test.
- `leave_one_out`: each user's last action is the test, the one before it validation (SASRec: Kang, McAuley 2018,
  arXiv 1808.09781).
- `time`: actions before a time are trained on; each later one is a target, in two spans for validation and test, and
  its query is the action before it.

A log in shards is split shard by shard, with the same rules and the same times; only users of the first shard validate.

Shapes: N rows of a log, U users, Q queries.
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
    """Kind of split and sizes of its parts."""

    kind: Literal["last", "leave_one_out", "time"] = "last"
    validation: float = 0.1
    """Share of the users (`last`) or of the actions (`time`) used for validation."""
    test: float = 0.1
    """Share of the actions, the newest ones, used as the test of a split by `time`."""
    held_users: float = 0.0
    """Share of the users held out: all queries come from them and none of their actions is trained on, as published.

    With 0, all users are both trained on and queried."""
    items_min: int = 1
    """Minimum number of occurrences of an item; actions on rarer items are dropped before the split."""
    questions_max: int = 20_000
    """Maximum number of queries per part; a larger set is sampled, using the seed."""

    def __post_init__(self) -> None:
        if not (0 < self.validation < 1 and 0 < self.test < 1 and self.validation + self.test < 1):
            raise ValueError("split.validation and split.test must be in (0, 1) and leave something to train on")
        if not 0 <= self.held_users < 1:
            raise ValueError("split.held_users must be in [0, 1)")
        if min(self.questions_max, self.items_min) < 1:
            raise ValueError("split.questions_max and split.items_min must be at least 1")


@dataclass(frozen=True, slots=True)
class Queries:
    """Q queries about one log, as pairs of ascending rows."""

    newest: I64
    """[Q] row of the user's newest action at the time of the query."""
    target: I64
    """[Q] row of the action to predict."""

    def __len__(self) -> int:
        return len(self.newest)

    def select(self, chosen: Bool) -> Queries:
        """Return the queries for which `chosen` [Q] is True."""
        return Queries(self.newest[chosen], self.target[chosen])

    def known(self, log: ActionLog, vocabularies: Vocabularies) -> Queries:
        """Return the queries whose target item is in the vocabulary."""
        return self.select(vocabularies.item_rows(log.actions["item"][self.target]) != UNKNOWN)


@dataclass(frozen=True, slots=True)
class Split:
    """A log, split."""

    log: ActionLog
    """The whole log, which the rows of queries refer to."""
    train: ActionLog
    validation: Queries
    test: Queries
    unseen_from_ms: int
    """Event time from which on no action is used for training or validation."""


@dataclass(frozen=True, slots=True)
class ShardedSplit:
    """A log in shards, split; there is no test."""

    log: ActionLog
    """All actions of the validating users; the rows of queries refer to it."""
    train: TrainShards
    validation: Queries
    unseen_from_ms: int
    """Event time from which on no action is used for training or validation."""


class TrainShards:
    """The training parts of a log in shards (a `LogParts`); each shard is read and split on demand."""

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
        """Number of shards."""
        return len(self._log)

    def part(self, number: int) -> ActionLog:
        """Return the training part of a shard."""
        return self.split(number).train

    def split(self, number: int) -> Split:
        """Return the split of a shard; only the first one has queries."""
        rng = np.random.default_rng([self._seed, 0, number])
        return _split(self._read(number), self._config, rng, cuts=self._cuts, validates=number == 0)

    def _read(self, number: int) -> ActionLog:
        log = self._log.read(number)
        return log if self._frequent is None else log.with_items(self._frequent)

    def item_counts(self, names: tuple[str, ...] = ()) -> ItemCounts:
        """Return the item counts of all training parts, counted once per `names`."""
        if names not in self._item_counts:
            counts = (self.part(number).item_counts(names) for number in range(self.parts))
            self._item_counts[names] = ItemCounts.total(counts)
        return self._item_counts[names]

    def vocabularies(self, *, items_min: int = 1) -> Vocabularies:
        """Return the names of the log and the items that occur at least `items_min` times in the training parts."""
        names = tuple(self._log.action_names), tuple(self._log.surface_names)
        return Vocabularies(self.item_counts().frequent(items_min), *names)

    def content(self) -> Iterator[bytes]:
        """Yield the digest of the shards."""
        yield self._log.digest.encode()


def split_shards(log: Shards, config: SplitConfig, *, seed: int) -> ShardedSplit:
    """Split a log in shards; the same seed and shards give the same queries.

    Only users of the first shard validate, and a split by time cuts every shard at the times of the first one, because
    each shard is a random sample of the users. In a `last` split the other shards are trained on whole.
    """
    train = TrainShards(log, config, seed=seed)
    first = train.split(0)
    user, target = first.log.user_of_row, first.validation.target
    kept = np.isin(user, user[target])  # [N] rows of validating users
    new_row = np.cumsum(kept) - 1  # [N] their rows in the selected log
    validation = Queries(new_row[first.validation.newest], new_row[target])
    unseen_from_ms = first.unseen_from_ms if config.kind == "time" else log.end_ms
    return ShardedSplit(first.log.select(kept), train, validation, unseen_from_ms)


def make_split(log: ActionLog, config: SplitConfig, *, seed: int) -> Split:
    """Split a log; the same seed gives the same queries."""
    return _split(log.with_frequent_items(config.items_min), config, np.random.default_rng([seed, 0]))


def cut_times(log: ActionLog, config: SplitConfig) -> tuple[int, int]:
    """Return the event times at which validation and test begin in a split by time."""
    return log.quantile_ms(1 - (config.test + config.validation)), log.quantile_ms(1 - config.test)


def _split(
    log: ActionLog,
    config: SplitConfig,
    rng: np.random.Generator,
    *,
    cuts: tuple[int, int] | None = None,
    validates: bool = True,
) -> Split:
    """Split one log: by its kind, then by held-out users, then sample the queries. The order of draws is fixed."""
    end_ms = int(log.actions["timestamp_ms"].max(initial=0)) + 1
    if config.kind == "leave_one_out":
        last = _rows_from_the_end(log, 1, at_least=3)
        before = _rows_from_the_end(log, 2, at_least=3)
        split = Split(log, _without(log, np.concatenate([last, before])), _queries(before), _queries(last), end_ms)
    elif config.kind == "time":
        split = _by_time(log, *(cuts or cut_times(log, config)))
    else:
        last = _rows_from_the_end(log, 1, at_least=3)
        sampled = min(LAST_USERS_MAX, round(config.validation * len(last))) if validates else 0
        users = rng.permutation(len(last))[:sampled]
        held = np.sort(last[users])
        split = Split(log, _without(log, held), _queries(held), _queries(held[:0]), end_ms)
    if config.held_users:
        split = _hold_out_users(split, rng.random(len(log.users)) < config.held_users)
    validation, test = (_sampled(part, config.questions_max, rng) for part in (split.validation, split.test))
    return Split(split.log, split.train, validation, test, split.unseen_from_ms)


def _by_time(log: ActionLog, validation_ms: int, test_ms: int) -> Split:
    """Train before `validation_ms`; validate until `test_ms` and test after it, on rows that have a row before them."""
    time_ms = log.actions["timestamp_ms"]
    follows = np.ones(len(log), np.bool_)  # [N] False in the first row of each user
    follows[log.starts[:-1][np.diff(log.starts) > 0]] = False
    validation = np.flatnonzero(follows & (time_ms >= validation_ms) & (time_ms < test_ms))
    test = np.flatnonzero(follows & (time_ms >= test_ms))
    return Split(log, log.before(validation_ms), _queries(validation), _queries(test), test_ms)


def _hold_out_users(split: Split, held: Bool) -> Split:
    """Keep the queries of the users for which `held` [U] is True, and train without those users."""
    user = split.log.user_of_row
    validation, test = (part.select(held[user[part.target]]) for part in (split.validation, split.test))
    return Split(split.log, split.train.select(~held[split.train.user_of_row]), validation, test, split.unseen_from_ms)


def _rows_from_the_end(log: ActionLog, number: int, *, at_least: int) -> I64:
    """Return row `number` from the end (1 is the last) of each user with `at_least` actions."""
    return log.starts[1:][np.diff(log.starts) >= at_least] - number


def _queries(targets: I64) -> Queries:
    """Return the query for each target row: the row before it is the user's newest action."""
    return Queries(targets - 1, targets)


def _without(log: ActionLog, rows: I64) -> ActionLog:
    kept = np.ones(len(log), np.bool_)
    kept[rows] = False
    return log.select(kept)


def _sampled(queries: Queries, queries_max: int, rng: np.random.Generator) -> Queries:
    """Return at most `queries_max` random queries, in their order."""
    chosen = np.zeros(len(queries), np.bool_)
    chosen[rng.permutation(len(queries))[:queries_max]] = True
    return queries.select(chosen)
