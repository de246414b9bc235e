"""Rows 10 to 15: the log changes underneath."""

from __future__ import annotations

import re
from typing import Any

from kafka.structs import OffsetAndMetadata

from infra.field_cases.case import Numbers, case, expect
from infra.field_cases.field import Field
from infra.field_cases.records import good, topic_partition, users
from infra.field_cases.site import Site

ONE: dict[str, dict[str, Any]] = {"topics": {"partitions": 1}}


def _rounds(site: Site, names: list[str], first: int, last: int) -> None:
    """Send the actions `first` to `last` of each user."""
    site.send([good(user, number) for number in range(first, last + 1) for user in names])


def _expect_ways(line: str) -> None:
    """Require that a refusal names both ways on."""
    expect("state adopt" in line, f"the refusal does not name `streamformer state adopt`: {line}")
    expect("app_id" in line, f"the refusal does not name a new app_id: {line}")


@case(10, "the source topic is created again")
def source_recreated(field: Field) -> Numbers:
    """The worker refuses and names the ways on; after `adopt` every sequence goes on in the new topic."""
    site, names = field.site(), users(40)
    _rounds(site, names, 1, 10)
    site.start()
    site.wait_lengths(dict.fromkeys(names, 10))
    site.stop()
    site.recreate(site.settings.topics.actions)
    _rounds(site, names, 11, 11)
    _expect_ways(site.refusal())
    plan = site.command("state", "adopt", "--at", "earliest")
    expect(plan.code == 0, f"the dry run ends with {plan.code}: {plan.output[-200:]}")
    _expect_ways(site.refusal())
    done = site.command("state", "adopt", "--at", "earliest", "--yes")
    expect(done.code == 0, f"adopt ends with {done.code}: {done.output[-200:]}")
    site.start()
    seconds = site.wait_lengths(dict.fromkeys(names, 11))
    return {"users": len(names), "seconds after adopt": seconds}


@case(11, "another topic under the same application id; a truncated log")
def foreign_log(field: Field) -> Numbers:
    """State of one topic is not applied to another, nor to a log that ends before the state does."""
    site, names = field.site(ONE), users(10)
    _rounds(site, names, 1, 3)
    site.start()
    site.wait_lengths(dict.fromkeys(names, 3))
    site.stop()
    renamed = {"topics": {**ONE["topics"], "actions": f"{site.settings.app_id}-other"}}
    other = field.site(renamed, name=site.settings.app_id)
    _rounds(other, names, 4, 4)
    _expect_ways(other.refusal())
    broker = field.own_broker()
    cut = field.site(ONE, servers=broker.bootstrap_servers)
    for number in range(1, 7):
        _rounds(cut, names, number, number)
    cut.start()
    cut.wait_lengths(dict.fromkeys(names, 6))
    cut.stop()
    broker.kill()
    log = broker.folder / "data" / f"{cut.settings.topics.actions}-0" / "00000000000000000000.log"
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    broker.restart()
    cut.reader.close()
    left = cut.reader.ends()[0]
    expect(left < 60, f"the log was not truncated: {left} records")
    line = cut.refusal()
    expect("state adopt" in line or "state skip" in line, f"the refusal names no way on: {line}")
    return {"records": 60, "left after truncation": left}


@case(12, "a disk from before the changelog was created again")
def foreign_disk(field: Field) -> Numbers:
    """Users of the new life keep all their actions, and those of the old life do not come back."""
    site, old, quiet, late = field.site(ONE), users(20, "old"), users(10, "quiet"), users(20, "late")
    _rounds(site, old, 1, 14)
    site.start()
    site.wait_lengths(dict.fromkeys(old, 14))
    site.stop()
    site.expect_group_free()
    with site.admin() as admin:
        admin.delete_groups([site.settings.app_id])
    topics = site.settings.topics
    site.recreate(topics.actions, topics.embeddings, site.settings.changelog_topic)
    _rounds(site, quiet, 1, 14)
    site.start(1)
    site.wait_lengths(dict.fromkeys(quiet, 14))
    for number in range(1, 7):  # more records than in the old life, so that the old disk looks like a part of them
        _rounds(site, late, number, number)
        site.wait_lengths(dict.fromkeys(late, number))
        site.watch(0.7)
    site.stop(1)
    site.start(0)
    _rounds(site, [*old, *quiet, *late], 21, 21)
    wanted = {**dict.fromkeys(old, 1), **dict.fromkeys(quiet, 15), **dict.fromkeys(late, 7)}
    return {"users": len(wanted), "seconds": site.wait_lengths(wanted, 15)}


@case(13, "records are deleted before they are read")
def expired_records(field: Field) -> Numbers:
    """Events that retention deleted are counted exactly, while a worker is frozen and while it is down."""
    site = field.site(ONE)
    topic, (user,) = site.settings.topics.actions, users(1)
    site.start()
    _rounds(site, [user], 1, 100)
    site.wait(lambda: site.committed() == 100, "100 events are committed")
    site.supervisor.pause(0)
    site.watch(0.5)
    _rounds(site, [user], 101, 150)
    site.delete_records(topic, {0: 130})
    site.supervisor.resume(0)
    site.wait(lambda: site.committed() == 150, "the events that are left are committed")
    live = site.metric("events_expired_total")
    expect(live == 30, f"{live:.0f} instead of 30 lost events were counted by the frozen worker")
    errors = [line for line in site.supervisor.log(0).splitlines() if " ERROR " in line and "30" in line]
    expect(len(errors) == 1, f"{len(errors)} error lines name the loss")
    site.stop()
    _rounds(site, [user], 151, 200)
    site.delete_records(topic, {0: 175})
    site.start()
    site.wait(lambda: site.committed() == 200, "the events after the gap are committed")
    restarted = site.metric("events_expired_total")
    expect(restarted == 25, f"{restarted:.0f} instead of 25 lost events were counted at the start")
    site.expect_no_exit()
    return {"lost while frozen": live, "lost while down": restarted}


@case(14, "the source topic gets more partitions")
def more_partitions(field: Field) -> Numbers:
    """A running worker notices within a minute and stops with the line that a start gives."""
    site = field.site()
    site.start()
    topic = site.settings.topics.actions
    with site.admin() as admin:
        admin.create_partitions({topic: 8})
    site.supervisor.workers[0].wanted = False
    seconds = site.wait(lambda: site.supervisor.exits, "the worker stops", 75)
    line = site.supervisor.exits[-1].last_line
    expect("8 partitions" in line and topic in line, f"the line does not say what was found: {line}")
    start = site.refusal()
    expect("8 partitions" in start, f"a start says: {start}")
    return {"seconds to notice": seconds}


@case(15, "an operator moves the group's offsets")
def moved_offsets(field: Field) -> Numbers:
    """The worker says what it found; `state skip` moves the partition on purpose."""
    site, (user,) = field.site(ONE), users(1)
    site.start()
    _rounds(site, [user], 1, 5)
    site.wait_lengths({user: 5})
    site.stop()
    site.expect_group_free()
    _rounds(site, [user], 6, 20)
    _move_and_start(site, 15)
    site.wait(lambda: _names(site, 15, 5), "a line names both offsets, 15 and 5", 40)
    site.supervisor.hold(0)
    site.expect_group_free()
    done = site.command("state", "skip", "--partition", "0", "--to", "15", "--yes")
    expect(done.code == 0, f"skip ends with {done.code}: {done.output[-200:]}")
    site.start()
    seconds = site.wait_lengths({user: 10})
    shown = site.command("state", "partitions").output
    expect("15" in shown, "the move is not recorded")
    site.stop()
    site.expect_group_free()
    _move_and_start(site, 2)
    site.wait(lambda: _names(site, 2, 20), "a line names both offsets, 2 and 20", 40)
    site.wait(lambda: site.committed() == 20, "the state's own offset is committed again", 20)
    site.wait_lengths({user: 10})
    return {"skipped": 10, "seconds after skip": seconds}


def _move_and_start(site: Site, offset: int) -> None:
    """Move the group's offset, as an operator does, and start a worker."""
    with site.admin() as admin:
        tp = topic_partition(site.settings.topics.actions, 0)
        admin.alter_group_offsets(site.settings.app_id, {tp: OffsetAndMetadata(offset, "", -1)})
    site.supervisor.start_once(0)


def _names(site: Site, *offsets: int) -> bool:
    """Return whether a line of the present start reports all these offsets and the commands."""
    lines = [line for line in site.supervisor.output(0).splitlines() if "state skip" in line]
    return any(all(re.search(rf" {offset}\b", line) for offset in offsets) for line in lines)
