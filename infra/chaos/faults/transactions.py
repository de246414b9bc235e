"""Leave transactions open in the input: every later record of a partition waits until they end.

Each transaction belongs to a program of its own, in a thread. A new producer of the same name ends what it left.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiokafka
from aiokafka.errors import KafkaError

from infra.chaos.fault_context import FaultContext, Steps
from infra.harness.events import Event, action, partition_of
from streams.config.settings import Settings

SHORT_S, LONG_S = 3.0, 24.0
"""Times for which a transaction is open; the second one is longer than the watchdog's time."""
TIMEOUT_MS = 60_000
EVENTS = 20
LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    """One transaction."""

    name: str
    events: Sequence[Event]
    seconds: float
    commits: bool


def left_open(context: FaultContext) -> Steps:
    """Hold one transaction open for longer than the watchdog's time, and short ones in another partition meanwhile."""
    settings, rng = context.deployment.settings, context.rng
    long, short = rng.sample(range(settings.topics.partitions), 2)
    threads = [
        _start(context, [Plan(_name(context, "long"), _events(context, long), LONG_S, rng.random() < 0.5)]),
        _start(
            context,
            [Plan(_name(context, "short"), _events(context, short), SHORT_S, each % 2 > 0) for each in range(6)],
        ),
    ]
    while any(thread.is_alive() for thread in threads):
        yield LOOK_S


def _name(context: FaultContext, which: str) -> str:
    return f"{context.deployment.settings.app_id}-open-{which}"


def _events(context: FaultContext, partition: int) -> list[Event]:
    """Return actions of users that nothing else acts for, all in one partition."""
    run, users, number = context.rng.randrange(10**6), list[str](), 0
    while len(users) < EVENTS:
        user = f"waits-{run}-{number}"
        if partition_of(user.encode(), context.deployment.settings.topics.partitions) == partition:
            users.append(user)
        number += 1
    return [action(user, 1) for user in users]


def _start(context: FaultContext, plans: Sequence[Plan]) -> threading.Thread:
    thread = threading.Thread(target=_carry_out, args=(context.deployment.settings, plans), daemon=True)
    thread.start()
    return thread


def _carry_out(settings: Settings, plans: Sequence[Plan]) -> None:
    async def work() -> None:
        for plan in plans:
            try:
                await _hold(settings, plan)
            except KafkaError:  # a broker that another fault has killed
                await _end(settings, plan.name)

    asyncio.run(work())


async def _hold(settings: Settings, plan: Plan) -> None:
    async with _producer(settings, plan.name) as producer:
        begun_s = time.monotonic()
        await producer.begin_transaction()
        for key, value in plan.events:
            partition = partition_of(key, settings.topics.partitions)
            await producer.send_and_wait(settings.topics.actions, value, key=key, partition=partition)
        await asyncio.sleep(max(0.0, plan.seconds - (time.monotonic() - begun_s)))
        await (producer.commit_transaction() if plan.commits else producer.abort_transaction())


async def _end(settings: Settings, name: str) -> None:
    """Abort what a transactional id has left open, as soon as the brokers let it."""
    until_s = time.monotonic() + TIMEOUT_MS / 1000
    while time.monotonic() < until_s:
        try:
            async with _producer(settings, name):
                return
        except KafkaError:
            await asyncio.sleep(0.5)


def _producer(settings: Settings, name: str) -> aiokafka.AIOKafkaProducer:
    return aiokafka.AIOKafkaProducer(
        bootstrap_servers=settings.kafka.bootstrap_servers, transactional_id=name, transaction_timeout_ms=TIMEOUT_MS
    )
