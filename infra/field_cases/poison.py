"""Rows 1 to 7 and 9: input that stops or fools the worker."""

from __future__ import annotations

import asyncio

from infra.field_cases.case import Numbers, case, expect
from infra.field_cases.field import Field
from infra.field_cases.records import Record, good, transaction, users
from infra.harness.events import partition_of


@case(3, "an upstream transaction stays open", quick=True)
def open_transaction(field: Field) -> Numbers:
    """A transaction that is open for four times the watchdog's time leaves the worker live and ready."""
    site = field.site({"worker": {"watchdog_timeout_ms": 5_000, "shutdown_timeout_ms": 4_000}})
    site.start()
    states: list[tuple[int, int]] = []

    async def hold() -> None:
        async with transaction(site.settings, f"{site.settings.app_id}-upstream") as send:
            await send([good("ann")])
            await asyncio.to_thread(site.watch, 20, lambda: states.append(site.health()))

    asyncio.run(hold())
    site.expect_no_exit()
    bad = [state for state in states if state != (200, 200)]
    expect(not bad, f"{len(bad)} of {len(states)} looks saw {bad[:1]} for livez and readyz")
    return {"seconds open": 20, "seconds to apply": site.wait_lengths({"ann": 1}), "looks": len(states)}


@case(4, "aborted records at the end of the log", quick=True)
def aborted_tail(field: Field) -> Numbers:
    """After 100 records of an aborted transaction the lag is 0."""
    site = field.site({"topics": {"partitions": 1}})
    site.send([good("ann")])

    async def abort() -> None:
        try:
            async with transaction(site.settings, f"{site.settings.app_id}-upstream") as send:
                await send([good(user) for user in users(100)])
                raise LookupError
        except LookupError:
            pass

    asyncio.run(abort())
    site.start()
    site.wait_lengths({"ann": 1})
    seconds = site.wait(lambda: site.metric("consumer_lag_records") == 0, "lag 0 after aborted records", 15)
    site.expect_no_exit()
    expect(set(site.lengths()) == {"ann"}, "aborted records were applied")
    return {"aborted": 100, "seconds to lag 0": seconds}


@case(5, "a key in the wrong partition", quick=True)
def misplaced_key(field: Field) -> Numbers:
    """Action and deletion of a user in another partition than its own are rejected as wrong-partition."""
    site = field.site()
    own = partition_of(b"bob", site.settings.topics.partitions)
    other = (own + 1) % site.settings.topics.partitions
    value = good("bob", 2).value
    site.send([good("bob"), Record(b"bob", value, partition=other), Record(b"bob", None, partition=other)])
    site.send([good("carl")])
    site.start()
    site.wait_lengths({"bob": 1, "carl": 1})
    site.wait(lambda: len(site.dead_letters()) == 2, "two dead letters")
    reasons = site.reasons()
    expect(reasons == ["wrong-partition"] * 2, f"the reasons are {reasons}")
    expect(site.metric("refused_total", 'reason="wrong-partition"') == 2, "the metric does not count them")
    expect(site.lengths()["bob"] == 1, "the user has two histories")
    site.expect_no_exit()
    return {"rejected": len(reasons)}
