"""Rows 1 to 7 and 9: input that stops or fools the worker."""

from __future__ import annotations

import asyncio
import json
import re
import struct
import time

from infra.field_cases.case import Numbers, case, expect
from infra.field_cases.field import Field
from infra.field_cases.records import Record, good, transaction, users, users_of_partition
from infra.field_cases.site import Site
from infra.harness import raw
from infra.harness.events import partition_of

CODECS = ("gzip", "snappy", "lz4", "zstd")
CLOUD_EVENT = (("ce_specversion", b"1.0"), ("ce_id", b"7"), ("ce_source", b"/shop"), ("ce_type", b"session.started"))


@case(1, "compressed topics")
def compressed_topics(field: Field) -> Numbers:
    """Records of topics with each codec are applied, restored on an empty disk, and printed by `tail`."""
    site = field.site({"topics": {"partitions": 1}})
    topics = site.settings.topics
    site.start()
    for codec in CODECS:
        for topic in (topics.actions, topics.embeddings, site.settings.changelog_topic):
            site.configure(topic, compression_type=codec)
        site.send([good(codec)])
        site.wait_lengths({codec: 1})
    site.lose_disk()
    site.start()
    site.send([good(codec, 2) for codec in CODECS])
    seconds = site.wait_lengths(dict.fromkeys(CODECS, 2))
    tail = site.command("tail", "--from-beginning", "--count", "4", "--json")
    expect(tail.code == 0, f"tail ends with {tail.code}: {tail.output[-200:]}")
    site.expect_no_exit()
    return {"codecs": len(CODECS), "seconds after an empty disk": seconds}


@case(2, "a header name that is not UTF-8; a batch with a bad checksum")
def unreadable_records(field: Field) -> Numbers:
    """The record is applied or a dead letter; a damaged batch is named and halts its partition only."""
    broker = field.own_broker()
    site = field.site(servers=broker.bootstrap_servers)
    topic = site.settings.topics.actions
    (own, *others), (damaged,) = users_of_partition(site.settings, 0, 3), users_of_partition(site.settings, 1, 1)
    site.start()
    site.send([good(others[0])])
    bad = good(own)
    raw.produce(
        site.settings.kafka.bootstrap_servers,
        topic,
        0,
        raw.batch_with_header(own.encode(), bad.value or b"", b"\xff\xfe"),
    )
    site.send([good(others[1])])
    seconds = site.wait_lengths(dict.fromkeys(others, 1))
    site.wait(lambda: own in site.lengths() or len(site.dead_letters()) == 1, "the record is applied or a dead letter")
    site.expect_no_exit()
    site.stop()
    site.send([good(damaged)])
    log = broker.folder / "data" / f"{topic}-1" / "00000000000000000000.log"
    content = bytearray(log.read_bytes())
    content[-3] ^= 1
    log.write_bytes(content)
    site.supervisor.start(0)
    site.send([good(others[1], 2)])
    site.wait_lengths({others[1]: 2})
    site.wait(lambda: site.supervisor.page(0, "/readyz")[0] == 503, "not ready while a partition is damaged")
    page = site.supervisor.page(0, "/readyz")[1]
    expect("1" in page and "0" in page, f"readyz does not name partition and offset: {page}")
    lines = [line for line in site.supervisor.log(0).splitlines() if topic in line and "offset" in line]
    expect(lines, "no line names topic and offset of the damaged batch")
    site.expect_no_exit()
    return {"seconds to go on": seconds, "lines about the damage": len(lines)}


@case(3, "an upstream transaction stays open")
def open_transaction(field: Field) -> Numbers:
    """A transaction that is open for three times the watchdog's time leaves the worker live and ready."""
    site = field.site({"worker": {"watchdog_timeout_ms": 5_000, "shutdown_timeout_ms": 4_000}})
    site.start()
    states: list[tuple[int, int]] = []

    async def hold() -> None:
        async with transaction(site.settings, f"{site.settings.app_id}-upstream") as send:
            await send([good("ann")])
            await asyncio.to_thread(site.watch, 16, lambda: states.append(site.health()))

    asyncio.run(hold())
    site.expect_no_exit()
    bad = [state for state in states if state != (200, 200)]
    expect(not bad, f"{len(bad)} of {len(states)} looks saw {bad[:1]} for livez and readyz")
    return {"seconds open": 16, "seconds to apply": site.wait_lengths({"ann": 1}), "looks": len(states)}


@case(4, "aborted records at the end of the log", quick=True)
def aborted_tail(field: Field) -> Numbers:
    """After 100 records of an aborted transaction the lag is 0."""
    site = field.site({"topics": {"partitions": 1}})
    site.start()
    site.send([good("ann")])
    site.wait_lengths({"ann": 1})

    async def abort() -> None:
        try:
            async with transaction(site.settings, f"{site.settings.app_id}-upstream") as send:
                await send([good(user) for user in users(100)])
                raise LookupError
        except LookupError:
            pass

    asyncio.run(abort())
    site.watch(3)
    seconds = site.wait(lambda: _lag(site) == 0, "lag 0 after aborted records", 15)
    site.watch(2)
    expect(_lag(site) == 0, f"the lag is {_lag(site):.0f} again")
    site.expect_no_exit()
    expect(set(site.lengths()) == {"ann"}, "aborted records were applied")
    return {"aborted": 100, "seconds to lag 0": seconds}


def _lag(site: Site) -> float:
    """Return the lag; infinity while the worker does not report one."""
    page = site.supervisor.page(0, "/metrics")[1]
    return site.metric("consumer_lag_records") if "streamformer_consumer_lag_records{" in page else float("inf")


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
    site.wait_lengths({"carl": 1})
    site.wait(lambda: len(site.dead_letters()) == 2, "two dead letters", 10)
    site.wait_lengths({"bob": 1})
    reasons = site.reasons()
    expect(reasons == ["wrong-partition"] * 2, f"the reasons are {reasons}")
    site.wait(lambda: site.metric("refused_total", 'reason="wrong-partition"') == 2, "the metric counts them", 5)
    site.expect_no_exit()
    return {"rejected": len(reasons)}


DELETION_KEYS = {
    "text": json.dumps("text").encode(),
    "framed": b"\0\0\0\0\5" + json.dumps("framed").encode(),
    "object": json.dumps({"user_id": "object"}).encode(),
    "1234567": struct.pack(">q", 1_234_567),
}
"""User -> key of its deletion, as other serializers write it."""


@case(6, "deletions whose keys have another form", quick=True)
def encoded_deletions(field: Field) -> Numbers:
    """Each deletion forgets its user or becomes a dead letter, wherever its producer has put it."""
    site = field.site()
    site.start()
    site.send([good(user) for user in DELETION_KEYS])
    site.wait_lengths(dict.fromkeys(DELETION_KEYS, 1))
    partitions = site.settings.topics.partitions
    for user, key in DELETION_KEYS.items():
        site.send([Record(key, None), Record(key, None, partition=partition_of(user.encode(), partitions))])
    site.send([good("ned")])
    site.wait_lengths({"ned": 1})

    def unanswered() -> list[str]:
        lengths, letters = site.lengths(), [letter.key for letter in site.dead_letters()]
        return [user for user, key in DELETION_KEYS.items() if lengths[user] and letters.count(key) < 2]

    site.wait(lambda: not unanswered(), f"deletions are carried out or rejected: {unanswered()}", 10)
    forgotten = sum(length == 0 for length in site.lengths().values())
    rejected = len(site.dead_letters())
    site.expect_no_exit()
    return {"deletions": 2 * len(DELETION_KEYS), "forgotten": forgotten, "rejected": rejected}


@case(7, "an event without data", quick=True)
def event_without_data(field: Field) -> Numbers:
    """A null value with the headers of a CloudEvent becomes a dead letter, and its user is not forgotten."""
    site = field.site()
    site.start()
    site.send([good("ann")])
    site.wait_lengths({"ann": 1})
    site.send([Record(b"ann", None, headers=CLOUD_EVENT), good("ann", 2)])
    seconds = site.wait_lengths({"ann": 2}, 15)
    site.wait(lambda: len(site.dead_letters()) == 1, "one dead letter", 10)
    site.send([Record(b"ann", None)])
    site.wait_lengths({"ann": 0})
    site.expect_no_exit()
    return {"seconds": seconds, "reason": site.reasons()[0]}


@case(9, "producers' clocks 5 minutes ahead")
def clocks_ahead(field: Field) -> Numbers:
    """Freshness is never negative; skew and the time from arrival to publishing have metrics of their own."""
    site = field.site()
    site.start()
    names = users(50)
    ahead_ms = time.time_ns() // 1_000_000 + 300_000
    site.send([good(user, timestamp_ms=ahead_ms) for user in names])
    site.wait_lengths(dict.fromkeys(names, 1))
    site.wait(lambda: site.metric("freshness_seconds_count") == 50, "freshness is counted")
    page = site.supervisor.page(0, "/metrics")[1]
    expect(site.metric("freshness_seconds_sum") >= 0, f"the sum is {site.metric('freshness_seconds_sum'):.0f} s")
    found = {
        word: set(re.findall(rf"^streamformer_(\w*{word}\w*)_count", page, re.MULTILINE))
        for word in ("skew", "latency")
    }
    expect(all(found.values()), f"no histogram of {[word for word, names in found.items() if not names]}")
    (latency,) = found["latency"]
    mean_s = site.metric(f"{latency}_sum") / max(1.0, site.metric(f"{latency}_count"))
    expect(0 <= mean_s < 30, f"the mean latency is {mean_s:.1f} s")
    skew_s = max(site.metric(f"{name}_sum") for name in found["skew"]) / 50
    expect(250 < abs(skew_s) < 350, f"the mean skew is {skew_s:.0f} s instead of 300")
    return {"skew s": skew_s, "latency s": mean_s}
