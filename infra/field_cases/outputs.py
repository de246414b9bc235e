"""Rows 17 to 22: outputs that are refused, that overflow, or that nobody takes."""

from __future__ import annotations

import time

from infra.field_cases.case import Numbers, case, expect
from infra.field_cases.field import Field
from infra.field_cases.records import Record, good, users, users_of_partition
from infra.field_cases.site import Site
from infra.harness.supervisor import ABORTED

MEGABYTE = str(1 << 20)
ONE = {"topics": {"partitions": 1}}


@case(17, "the output topic refuses records for 5 s", quick=True)
def refused_outputs(field: Field) -> Numbers:
    """Publishing goes on within seconds of the cause going away; until then the worker is live and not ready."""
    site, names, states = field.site(), users(60), []
    site.start()
    site.send([good(user, 1) for user in names])
    site.wait_lengths(dict.fromkeys(names, 1))
    site.configure(site.settings.topics.embeddings, max_message_bytes="10")
    for number in range(2, 10):
        site.send([good(user, number) for user in names])
        site.watch(1.0, lambda: states.append(site.health()))
    site.configure(site.settings.topics.embeddings, max_message_bytes=MEGABYTE)
    site.send([good(user, 10) for user in names])
    seconds = site.wait_lengths(dict.fromkeys(names, 10), 20)
    site.wait(site.supervisor.is_ready, "the worker is ready again", 10)
    site.expect_no_exit()
    expect(all(live == 200 for live, _ in states), "the worker was not live")
    expect(any(ready == 503 for _, ready in states), "the worker was ready although it published nothing")
    return {"seconds to publish": seconds, "failures": site.metric("publish_failures_total")}


@case(18, "2^31 embeddings of one partition", quick=True)
def worn_out_sequence(field: Field) -> Numbers:
    """A producer whose sequence numbers are at their end is replaced, and publishing goes on."""
    site = field.site(ONE, alteration=("sequence", str(2**31 - 100)))
    site.start()
    names = users(300)
    for begin in range(0, 300, 50):
        site.send([good(user) for user in names[begin : begin + 50]])
        site.watch(0.3)
    seconds = site.wait_lengths(dict.fromkeys(names, 1))
    site.expect_no_exit()
    return {"embeddings": len(names), "seconds": seconds}


@case(19, "an output and a dead-letter partition without a leader", brokers=3)
def leaderless_outputs(field: Field) -> Numbers:
    """Partition 0 waits for its output and partition 1 for its dead letters; the others never stop."""
    site = field.cluster_site()
    topics, lost = site.settings.topics, field.cluster().brokers[1]
    kept = [broker.id for broker in field.cluster().brokers if broker is not lost]
    for topic, alone in ((topics.embeddings, 0), (topics.dead_letter, 1)):
        _place(site, topic, {number: [lost.id] if number == alone else [kept[number % 2]] for number in range(4)})
    by_partition = {number: users_of_partition(site.settings, number, 20) for number in range(4)}
    everyone = [user for names in by_partition.values() for user in names]
    site.start()
    site.send([good(user) for user in everyone])
    site.wait_lengths(dict.fromkeys(everyone, 1))
    lost.kill()
    site.watch(5.0)
    begun_s, others = time.monotonic(), [*by_partition[2], *by_partition[3]]
    site.send([*(good(user, 2) for user in everyone), Record(by_partition[1][0].encode(), b"{")])
    waited_s = _published_elsewhere(site, others)
    site.watch(max(0.0, 25.0 - (time.monotonic() - begun_s)))
    site.expect_no_exit()
    lost.restart()
    site.reader.close()
    seconds = site.wait_lengths(dict.fromkeys(everyone, 2), 30)
    site.wait(lambda: len(site.dead_letters()) == 1, "the dead letter has arrived")
    site.expect_no_exit()
    return {"seconds of the others": waited_s, "seconds after the heal": seconds}


def _place(site: Site, topic: str, assignments: dict[int, list[int]]) -> None:
    """Create a topic again with one replica per partition, on chosen brokers."""
    with site.admin() as admin:
        admin.delete_topics([topic])
        site.wait(lambda: topic not in admin.list_topics(), "the topic is gone")
        policy = "compact" if topic == site.settings.topics.embeddings else "delete"
        configs = {"cleanup.policy": policy, "min.insync.replicas": "1"}
        admin.create_topics({topic: {"assignments": assignments, "configs": configs}}, wait_for_metadata=True)


def _published_elsewhere(site: Site, names: list[str]) -> float:
    """Wait until the worker has published as many embeddings as these users need; the topic itself cannot be read."""
    before = site.metric("embeddings_published_total")
    return site.wait(
        lambda: site.metric("embeddings_published_total") >= before + len(names) or _committed_elsewhere(site, 4 * 20),
        "the other partitions publish",
        20,
    )


def _committed_elsewhere(site: Site, records: int) -> bool:
    committed = site.reader.committed()
    return committed.get(2, 0) + committed.get(3, 0) >= records


@case(20, "a dead letter that its topic refuses as too large", quick=True)
def oversized_dead_letter(field: Field) -> Numbers:
    """After a smaller dead letter and before another one, it arrives without its value, and a header says so."""
    site = field.site(ONE)
    site.configure(site.settings.topics.dead_letter, max_message_bytes="2000")
    site.start()
    site.send([Record(b"ann", b"{")])
    site.wait(lambda: len(site.dead_letters()) == 1, "the first dead letter")
    site.send([Record(b"bob", b"{" + b"x" * 20_000), Record(b"cid", b"{"), good("dan")])
    site.wait_lengths({"dan": 1})
    site.wait(lambda: len(site.dead_letters()) == 3, "three dead letters", 15)
    large = site.dead_letters()[1]
    expect(large.value in (None, b""), "the value was not left out")
    said = [name for name, value in large.headers if b"20001" in value or "value" in name]
    expect(said, f"no header says that the value was left out: {[name for name, _ in large.headers]}")
    site.wait(lambda: site.committed() == 4, "everything is committed")
    site.expect_no_exit()
    return {"dead letters": 3, "header": said[0]}


@case(21, "many bad records in a row")
def flood_of_poison(field: Field) -> Numbers:
    """200,000 rejected records become dead letters in bounded memory, with checkpoints on the way."""
    site, count = field.site({**ONE, "worker": {"watchdog_timeout_ms": 8_000, "shutdown_timeout_ms": 6_000}}), 200_000
    site.start()
    site.send([good("ann")])
    site.wait_lengths({"ann": 1})
    base_mb = peak_mb = site.supervisor.memory_mb(0)
    site.send([Record(b"bad", b"{" + b"x" * 400)] * count, linger_ms=20)
    seen, moved_s, gap_s = 0, time.monotonic(), 0.0
    until_s = time.monotonic() + 120
    while seen < count and time.monotonic() < until_s:
        site.watch(0.5)
        peak_mb = max(peak_mb, site.supervisor.memory_mb(0))
        if (committed := site.committed()) > seen:
            seen, moved_s = committed, time.monotonic()
        gap_s = max(gap_s, time.monotonic() - moved_s)
    site.wait(lambda: site.committed() == count + 1, "all are committed", 5)
    arrived = sum(site.reader.ends(site.settings.topics.dead_letter).values())
    expect(arrived == count, f"{arrived} dead letters instead of {count}")
    expect(peak_mb - base_mb < 200, f"memory grew by {peak_mb - base_mb:.0f} MB")
    expect(gap_s < 8, f"{gap_s:.1f} s without a checkpoint")
    site.expect_no_exit()
    return {"bad records": count, "MB more": peak_mb - base_mb, "seconds without a checkpoint": gap_s}


@case(22, "topics that take small batches only", quick=True)
def small_batches(field: Field) -> Numbers:
    """With 20 kB per batch, checkpoints, embeddings and dead letters of 1,500 users arrive, also on an empty disk."""
    site, names = field.site(ONE), users(1_500)
    topics = site.settings.topics
    for topic in (topics.embeddings, topics.dead_letter, site.settings.changelog_topic):
        site.configure(topic, max_message_bytes="20000")
    site.send([*(good(user, number) for number in (1, 2) for user in names), *[Record(b"bad", b"{" * 300)] * 200])
    site.start()
    seconds = site.wait_lengths(dict.fromkeys(names, 2))
    site.wait(lambda: site.committed() == 3_200, "everything is committed")
    expect(len(site.dead_letters()) == 200, f"{len(site.dead_letters())} dead letters instead of 200")
    site.lose_disk()
    site.start()
    site.send([good(user, 3) for user in names[:10]])
    site.wait_lengths(dict.fromkeys(names[:10], 3))
    expect(not [each for each in site.supervisor.exits if each.code == ABORTED], "the worker ended")
    return {"users": len(names), "seconds": seconds}
