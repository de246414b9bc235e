"""Features beside the sequences of a partition: through batches, deletions, evictions, checkpoints and restarts."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import tomllib
from typing import Any

import numpy as np
import pytest

from encoder.actions.columns import ActionBatch
from infra.harness.feature_model import Event, values
from streams.core.features.definitions import DAY_MS, HOUR_MS, parse_features
from streams.core.features.partition import FeatureConfig, RefreshPolicy
from streams.core.layout import NEVER, StateLimits
from streams.core.merge import Outcome
from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.storage.checkpoint import CheckpointMark, checkpoint
from streams.storage.features import encode_features, features_key, former_definitions
from streams.storage.memory_store import MemoryStore
from streams.storage.reader import read_users
from tests.unit.core.features.definitions import TOML
from tests.unit.core.features.histories import ATTRIBUTES, FUNCTIONS, ITEMS, actions_of
from tests.unit.core.features.values import agrees, near_tie

LIMITS = StateLimits(sequence_length=8, chunk_length=2, hot_users_max=4, counts_too_old=True)
TABLES = tomllib.loads(TOML)["feature"]
CONFIG = FeatureConfig(parse_features(TOML, ATTRIBUTES.names), ATTRIBUTES, FUNCTIONS)
USERS = [f"user-{number}".encode() for number in range(7)]
NOW_MS = 20_040 * DAY_MS


class Transaction:
    """A changelog that may fail to commit."""

    fails = False

    async def begin(self) -> None:
        """Do nothing."""

    async def append(self, records: Any) -> int:
        """Return an offset."""
        return 0

    async def send_source_offset(self, offset: int) -> None:
        """Do nothing."""

    async def commit(self) -> None:
        """Fail if that is wanted."""
        if self.fails:
            raise OSError("no broker")

    async def acknowledged(self) -> None:
        """Do nothing: nothing is sent."""


class Site:
    """A partition over a store in memory, and the events that the model has of each user."""

    def __init__(self, limits: StateLimits = LIMITS, config: FeatureConfig = CONFIG) -> None:
        self.limits, self.config, self.store, self.offset = limits, config, MemoryStore(), 0
        self.log = Transaction()
        self.state = PartitionState(TriggerPolicy(), limits, config)
        self.events: dict[bytes, list[Event]] = {user: [] for user in USERS}

    def restart(self, config: FeatureConfig | None = None) -> None:
        """Continue from the last checkpoint, which must contain everything."""
        self.config = config or self.config
        self.state = PartitionState(TriggerPolicy(), self.limits, self.config)

    def load(self, users: list[bytes]) -> None:
        """Take users into memory."""
        cold = self.state.missing(users)
        if self.state.evict(len(cold), spare=users) < 0 or self.state.room < len(cold):
            self.checkpoint()
            self.publish(list(self.state._sequences.row_of))
            self.checkpoint()
            self.state.evict(len(cold), spare=users)
        read = read_users(self.store, cold, self.limits, with_features=True)
        assert self.state.features is not None
        assert not read.corrupt
        for version, found in former_definitions(
            self.store, self.state.features.unknown_versions(read.features)
        ).items():
            self.state.features.learn(version, found)
        self.state.load(cold, read.stored, read.features)

    def apply(self, batch: list[tuple[bytes, Event]]) -> None:
        """Apply events, one without an item being a deletion, and tell the model which of them count."""
        self.load(list(dict.fromkeys(user for user, _ in batch)))
        events = [event for _, event in batch]
        forgets = np.array([not event.item for event in events])
        numbers = np.array([np.nan if event.value is None else event.value for event in events])
        offsets = np.arange(self.offset, self.offset + len(batch))
        columns = actions_of(events), offsets, forgets, np.full(len(batch), NOW_MS), numbers
        effects = self.state.apply(ActionBatch([user for user, _ in batch], *columns), NOW_MS)
        self.offset += len(batch)
        for (user, event), outcome in zip(batch, effects.outcomes.tolist(), strict=True):
            known = self.events[user]
            if not event.item:
                known.clear()
            elif outcome in (Outcome.APPLIED, Outcome.LATE, Outcome.TOO_OLD):
                gap = event.timestamp_ms - max((each.timestamp_ms for each in known), default=event.timestamp_ms)
                if self.limits.user_ttl_ms and gap >= self.limits.user_ttl_ms:
                    known.clear()
                known.append(dataclasses.replace(event, arrival=self.offset * 100 + len(known)))

    def checkpoint(self, *, fails: bool = False) -> None:
        """Write a checkpoint, or fail to."""
        self.log.fails = fails
        writing = checkpoint(self.state, CheckpointMark(self.offset, 0), self.log, self.log, self.store)
        if fails:
            with pytest.raises(OSError, match="no broker"):
                asyncio.run(writing)
        else:
            asyncio.run(writing)

    def publish(self, users: list[bytes]) -> None:
        """Take and finish the jobs of users, so that they can be evicted."""
        job = self.state.begin_job(users)
        self.state.finish_feature_job(self.state.feature_job(job.sequences.users, NOW_MS), NOW_MS)
        self.state.finish_job(job.sequences.users, job.offsets, NOW_MS)

    def check(self, tables: list[dict[str, Any]] = TABLES, complete: bool = True) -> None:
        """Compare the values of every user with the model."""
        for user in USERS:
            self.load([user])
            job = self.state.feature_job([user], NOW_MS)
            if not self.events[user]:
                assert not len(job)
                continue
            found = json.loads(job.records.values[0])
            wanted = values(tables, self.events[user], int(job.as_of_ms[0]), ITEMS)
            partial = job.records.completeness[0]
            assert not (complete and partial)
            for name, value in wanted.items():
                is_tied = name.endswith("affinity") and near_tie(value)
                assert name in partial or is_tied or agrees(found[name], value), (user, name, found[name], value)
            self.publish([user])


def random_event(rng: random.Random) -> Event:
    """Return an event of the last 40 days; half of them are of the last hours."""
    age_ms = rng.randrange(40 * DAY_MS) if rng.random() < 0.5 else rng.randrange(6 * HOUR_MS)
    value = round(rng.uniform(-9, 9), 3) if rng.random() < 0.7 else None
    where = rng.choice(["", "home", "search"])
    item, action = rng.choice(list(ITEMS)), rng.choice(["buy", "view"])
    return Event(item, action, NOW_MS - age_ms, where, rng.randrange(5_000), value)


def deletion(rng: random.Random) -> Event:
    """Return a deletion of the last 20 days."""
    return Event("", "", NOW_MS - rng.randrange(20 * DAY_MS))


def run(site: Site, rng: random.Random, batches: int, deletions: float = 0.02) -> None:
    """Apply random batches with checkpoints, failed ones and restarts in between."""
    for _ in range(batches):
        users = rng.sample(USERS, 3)
        events = [deletion(rng) if rng.random() < deletions else random_event(rng) for _ in range(rng.randrange(1, 12))]
        batch = [(rng.choice(users), event) for event in events]
        site.apply(batch)
        if rng.random() < 0.3:
            site.checkpoint(fails=rng.random() < 0.4)
        if rng.random() < 0.15:
            site.checkpoint()
            site.restart()


@pytest.mark.parametrize("seed", range(12))
def test_features_are_those_of_every_event_through_any_history(seed: int) -> None:
    """Late events older than everything kept count too; deletions clear; nothing is lost by eviction or restart."""
    rng = random.Random(seed)
    site = Site(dataclasses.replace(LIMITS, user_ttl_ms=2 * DAY_MS if seed % 3 == 2 else 0))
    run(site, rng, 30)
    site.check()
    site.checkpoint()
    site.restart()
    site.check()


@pytest.mark.parametrize("seed", range(6))
def test_changed_definitions_keep_what_is_unchanged_and_state_what_is_not_complete(seed: int) -> None:
    """The features of an unchanged definition stay exact; of a new one those that are complete are exact."""
    rng = random.Random(seed)
    site = Site()
    run(site, rng, 30, deletions=0)
    site.checkpoint()
    changed = (
        TOML.replace('window = "7d"', 'window = "14d"') + '[[feature]]\nname = "new"\nkind = "count"\nwindow = "1h"\n'
    )
    site.restart(FeatureConfig(parse_features(changed, ATTRIBUTES.names), ATTRIBUTES, FUNCTIONS))
    site.check(tomllib.loads(changed)["feature"], complete=False)
    run(site, rng, 10, deletions=0)
    site.check(tomllib.loads(changed)["feature"], complete=False)
    site.load(USERS[:1])
    partial = site.state.feature_job(USERS[:1], NOW_MS).records.completeness[0]
    assert "since" not in partial
    assert "views" not in partial  # unchanged


def test_lost_definitions_cost_what_the_sequence_does_not_keep() -> None:
    """Without the definitions of before, everything is computed from the kept actions, and says so."""
    rng = random.Random(3)
    site = Site()
    run(site, rng, 40, deletions=0)
    site.checkpoint()
    site.store.records = {key: value for key, value in site.store.records.items() if key[:1] != b"d"}
    site.restart(FeatureConfig(parse_features(TOML.replace("k = 3", "k = 4"), ATTRIBUTES.names), ATTRIBUTES, FUNCTIONS))
    site.load(USERS[:1])
    job = site.state.feature_job(USERS[:1], NOW_MS)
    assert job.records.completeness[0]["price"] < 1
    assert site.state.features is not None
    assert site.state.features.rebuilt == 1


def test_features_written_before_a_time_without_them_are_computed_again() -> None:
    """A sequence that went on alone has another count than the stored features, which are then not used."""
    site = Site()
    user = USERS[0]
    site.apply([(user, Event("item-1", "view", NOW_MS - 1_000))])
    site.checkpoint()
    without = PartitionState(TriggerPolicy(), dataclasses.replace(LIMITS, counts_too_old=False))
    without.load([user], read_users(site.store, [user], LIMITS).stored)
    event = Event("item-2", "view", NOW_MS - 500)
    columns = actions_of([event]), np.array([1]), np.array([False]), np.array([NOW_MS])
    without.apply(ActionBatch([user], *columns), NOW_MS)
    asyncio.run(checkpoint(without, CheckpointMark(2, 0), site.log, site.log, site.store))
    site.restart()
    site.load([user])
    assert json.loads(site.state.feature_job([user], NOW_MS).records.values[0])["views"] == 2


def test_a_deletion_deletes_the_features_also_where_none_are_computed() -> None:
    """The record is deleted with the user's chunks, by a worker with features and by one without."""
    for config in (CONFIG, None):
        site = Site()
        site.apply([(USERS[0], Event("item-1", "view", NOW_MS - 1_000))])
        site.checkpoint()
        assert features_key(USERS[0]) in site.store.records
        state = PartitionState(TriggerPolicy(), LIMITS, config)
        read = read_users(site.store, USERS[:1], LIMITS, with_features=True)
        state.load(USERS[:1], read.stored, read.features)
        columns = actions_of([Event("", "", NOW_MS)]), np.array([9]), np.array([True]), np.array([NOW_MS])
        state.apply(ActionBatch(USERS[:1], *columns), NOW_MS)
        assert encode_features(state.begin_checkpoint()) == [(features_key(USERS[0]), None)]


def test_a_refresh_is_handed_over_when_a_value_changes_and_again_until_it_is_acknowledged() -> None:
    """The deadline is stored with the features, so a restart finds it without reading every user."""
    refresh = RefreshPolicy(enabled=True, every_min_ms=1_000)
    site = Site(config=dataclasses.replace(CONFIG, refresh=refresh))
    user = USERS[0]
    site.apply([(user, Event("item-1", "view", NOW_MS - 1_000))])
    site.publish([user])
    site.checkpoint()
    pending = [due_ms for name, due_ms in site.store.pending() if name == user]
    assert NOW_MS < min(pending) <= NOW_MS + HOUR_MS
    site.restart()
    site.state.seed_deadlines(site.store.pending())
    at_ms = min(pending) + 200
    assert site.state.fire_timers(at_ms - 10_000).to_load == []
    assert site.state.fire_timers(at_ms).to_load == [user]
    site.load([user])
    assert site.state.fire_timers(at_ms).refresh == [user]
    assert site.state.fire_timers(at_ms + 100).refresh == []
    assert site.state.fire_timers(at_ms + 6_000).refresh == [user]  # the first was not acknowledged
    site.state.finish_feature_job(site.state.feature_job([user], at_ms + 6_000), at_ms + 6_000)
    assert site.state.fire_timers(at_ms + 12_000).refresh == []


@pytest.mark.parametrize(
    ("policy", "valid_until_ms", "newest_ms", "expected"),
    [
        (RefreshPolicy(), 1_000, 0, NEVER),
        (RefreshPolicy(True, 10), 1_000, 0, 1_000),
        (RefreshPolicy(True, 10), 100, 0, 110),
        (RefreshPolicy(True, 10), 2**62, 0, NEVER),
        (RefreshPolicy(True, 10, 500), 1_000, 600, 1_000),
        (RefreshPolicy(True, 10, 500), 1_000, 400, NEVER),
    ],
)
def test_when_a_user_is_refreshed(policy: RefreshPolicy, valid_until_ms: int, newest_ms: int, expected: int) -> None:
    """Never, when a value changes but not before the least interval, or only while the user is active."""
    assert policy.next_ms(np.array([valid_until_ms]), np.array([newest_ms]), 100).tolist() == [expected]


def test_a_user_that_is_due_is_not_looked_at_for_its_refresh() -> None:
    """A refresh that has passed while a user cools down is not a deadline: the user is published soon anyway."""
    site = Site(config=dataclasses.replace(CONFIG, refresh=RefreshPolicy(enabled=True, every_min_ms=1)))
    site.state = PartitionState(TriggerPolicy(cooldown_ms=100 * DAY_MS), LIMITS, site.config)
    user = USERS[0]
    site.apply([(user, Event("item-1", "view", NOW_MS - 1_000))])
    site.publish([user])
    site.apply([(user, Event("item-2", "view", NOW_MS - 500))])  # due, and cooling down
    later_ms = NOW_MS + 50 * DAY_MS
    assert site.state.fire_timers(later_ms).refresh == []
    assert site.state.next_deadline_ms is not None
    assert site.state.next_deadline_ms > later_ms
