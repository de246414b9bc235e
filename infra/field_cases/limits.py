"""Rows 32 to 38: limits and overload."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiokafka
import numpy as np

from infra.field_cases.case import Numbers, case, expect
from infra.field_cases.field import Field
from infra.field_cases.records import good, users
from infra.field_cases.site import Site
from infra.harness.events import partition_of
from streams.wire.embeddings import EmbeddingBatch, EmbeddingCodec, encode_embeddings

ONE = {"topics": {"partitions": 1}}


def _policy(field: Field, **keys: Any) -> dict[str, Any]:
    """Write a trigger policy and return the settings that name it."""
    path: Path = field.folder / f"policy-{field.number}.toml"
    lines = [f"{key} = {value}" for key, value in keys.items()]
    path.write_text("\n".join(["[triggers]", *lines]) + "\n")
    return {"triggers": {"policy_file": str(path)}}


@case(32, "a waiting user makes a strong action")
def promotion(field: Field) -> Numbers:
    """The user overtakes those that wait for a weaker reason, and its embedding names the stronger one."""
    settings = {**ONE, "queue": {"batch_users_max": 1}, **_policy(field, every_n=1, strong='["save"]')}
    site, names = field.site(settings, alteration=("slow", "40")), users(200)
    site.start()
    site.send([good(user) for user in names])
    site.wait(lambda: len(site.lengths()) >= 10, "the first embeddings")
    site.send([good(names[-1], 2, action="save")])
    site.wait_lengths({names[-1]: 2})
    outputs = site.reader.read_all(site.settings.topics.embeddings)
    place = next(index for index, each in enumerate(outputs) if dict(each.headers)["sequence-length"] == b"2")
    reason = dict(outputs[place].headers)["reason"].decode()
    expect(reason == "strong", f"the reason is {reason}")
    expect(place < 150, f"the user was published as number {place} of {len(names)}")
    site.wait_lengths(dict.fromkeys(names[:-1], 1))
    return {"waiting": len(names), "place": place}


@case(33, "more hot users than the queue holds")
def shed_users(field: Field) -> Numbers:
    """Shed users write nothing to the changelog until they are encoded."""
    settings = {**ONE, "queue": {"batch_users_max": 1, "users_max": 20}, "kafka": {"poll_records_max": 1_000}}
    site, names = field.site(settings, alteration=("slow", "40")), users(600)
    site.send([good(user) for user in names])
    site.start()
    site.wait(lambda: site.metric("shed_total") > 0, "users are shed")
    site.watch(3)
    before = site.metric("changelog_records_total"), site.metric("embeddings_published_total")
    site.watch(8)
    records = site.metric("changelog_records_total") - before[0]
    encoded = site.metric("embeddings_published_total") - before[1]
    expect(encoded > 10, f"only {encoded:.0f} users were encoded")
    expect(records < 4 * encoded + 50, f"{records:.0f} changelog records for {encoded:.0f} encoded users")
    site.wait_lengths(dict.fromkeys(names, 1), 40)
    return {"encoded in 8 s": encoded, "changelog records": records, "shed": site.metric("shed_total")}


@case(34, "one user on whom the encoder raises", quick=True)
def unencodable_user(field: Field) -> Numbers:
    """The others of its batch are published at once, from a cache that is left alone."""
    site, names = field.site(ONE, alteration=("encoder", "bad")), users(1_000)
    site.start()
    site.send([good(user, 1) for user in names])
    site.wait_lengths(dict.fromkeys(names, 1))
    prefills = site.metric("cache_prefills_total")
    site.send([*(good(user, 2) for user in names[:500]), good("bad", 1), *(good(user, 2) for user in names[500:])])
    seconds = site.wait_lengths(dict.fromkeys(names, 2), 20)
    again = site.metric("cache_prefills_total") - prefills
    expect(again <= 20, f"{again:.0f} of {len(names)} cached users were computed anew")
    begin = site.metric("encode_failures_total")
    site.watch(5)
    failures = site.metric("encode_failures_total") - begin
    expect(failures <= 10, f"{failures:.0f} failed attempts in 5 s for one user")
    expect(seconds < 8, f"the others waited {seconds:.1f} s")
    site.expect_no_exit()
    return {"seconds of the others": seconds, "prefills": again, "failures": site.metric("encode_failures_total")}


@case(35, "many cold users with a session gap of 24 h")
def bounded_wheel(field: Field) -> Numbers:
    """Loading cold users again and again does not make memory grow."""
    limits = {"state": {"hot_users_max": 200}, "kafka": {"poll_records_max": 200}}
    site = field.site({**ONE, **limits, **_policy(field, every_n=0, session_gap_ms=86_400_000)})
    site.start()
    names, memory_mb, sent = users(1_500), [], 0
    for number in range(1, 41):
        site.send([good(user, number) for user in names], linger_ms=5)
        sent += len(names)
        if number in (20, 40):
            site.wait(lambda: site.committed() >= sent - 200, "the events are applied", 60)  # noqa: B023
            memory_mb.append(site.supervisor.memory_mb(0))
    growth_mb = memory_mb[1] - memory_mb[0]
    expect(growth_mb < 25, f"memory grew by {growth_mb:.0f} MB over {sent // 2} cold loads")
    site.expect_no_exit()
    return {"cold loads": sent, "MB more in the second half": growth_mb}


@case(36, "partitions that moved away", workers=2)
def former_stores(field: Field) -> Numbers:
    """The local stores of partitions that moved to another worker are deleted after the set time."""
    site = field.site({"state": {"former_store_ttl_ms": 4_000}})
    names = users(100)
    site.start(0)
    site.send([good(user) for user in names])
    site.wait_lengths(dict.fromkeys(names, 1))
    before = _stores(site, 0)
    site.start(1)
    owned = site.wait(lambda: site.metric("partitions", 'state="ready"', 1) == 2, "two partitions have moved") and 2
    seconds = site.wait(lambda: _stores(site, 0) == owned, f"{before - 2} of {before} stores are deleted", 30)
    site.send([good(user, 2) for user in names])
    site.wait_lengths(dict.fromkeys(names, 2))
    site.expect_no_exit()
    return {"stores before": before, "after": owned, "seconds": seconds}


def _stores(site: Site, number: int) -> int:
    """Return the number of databases on a worker's disk."""
    return len(list(site.deployment.data_dir(number).rglob("CURRENT")))


@case(37, "a new application id beside a large output topic")
def large_output_topic(field: Field) -> Numbers:
    """The worker starts in bounded memory and writes nothing about users that it has never seen."""
    site, count = field.site(), 30_000
    asyncio.run(_fill(site, count))
    site.supervisor.start(0)
    seconds = site.wait(site.supervisor.is_ready, "the worker is ready", 40)
    site.send([good("ann")])
    site.wait_lengths({"ann": 1})
    site.watch(3)
    written = site.metric("changelog_records_total")
    expect(written < 100, f"{written:.0f} records were written to the changelog for one user")
    site.expect_no_exit()
    return {"embeddings": count, "seconds to ready": seconds, "changelog records": written}


async def _fill(site: Site, count: int) -> None:
    """Publish embeddings of many users, as an earlier application with the same release has."""
    names, version = [name.encode() for name in users(count, "earlier")], site.deployment.oracle().version
    numbers = np.arange(count, dtype=np.int64)
    batch = EmbeddingBatch(
        names, np.ones((count, 16), np.float32), numbers, numbers + 1, ["every_n"] * count, numbers, version, 1
    )
    topics = site.settings.topics
    servers = site.settings.kafka.bootstrap_servers
    async with aiokafka.AIOKafkaProducer(bootstrap_servers=servers, linger_ms=20) as producer:
        for key, value, headers in encode_embeddings(batch, EmbeddingCodec.FLOAT32):
            partition = partition_of(key, topics.partitions)
            await producer.send(topics.embeddings, value, key=key, headers=headers, partition=partition)
        await producer.flush()


@case(38, "four partitions come to one worker", workers=2)
def bounded_per_worker(field: Field) -> Numbers:
    """The number of users in memory has one bound per worker, whichever partitions it has."""
    bounds = {"hot_users_worker_max": 600, "hot_users_max": 300}
    site = field.site({"state": bounds, "kafka": {"poll_records_max": 100}})
    site.start(0, 1)
    names, seen = users(3_000), []
    site.wait(lambda: site.metric("partitions", 'state="ready"', 1) == 2, "the partitions are shared")
    site.send([good(user, 1) for user in names])
    site.wait_lengths(dict.fromkeys(names, 1))
    site.supervisor.hold(1)
    site.wait(lambda: site.metric("partitions", 'state="ready"') == 4, "the survivor has all partitions", 40)
    for number in (2, 3):
        site.send([good(user, number) for user in names])
        site.wait_lengths(dict.fromkeys(names, number))
        site.watch(2.5, lambda: seen.append(site.metric("hot_users")))
    expect(max(seen) <= 600, f"{max(seen):.0f} users in memory where 600 are allowed")
    site.expect_no_exit()
    return {"users": len(names), "most in memory": max(seen)}
