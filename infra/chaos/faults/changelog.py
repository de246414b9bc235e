"""Damage to the changelog, tried on an application of its own: there is no going on from it for the whole run.

A small application is fed and stopped; its changelog is cut, emptied or created anew; then it starts again, with its
disk kept and with an empty one. Two ends are right: it goes on and every law holds, or it refuses, says so in a line
that names the changelog, and leaves the committed offset where it was. Going on from less than all is the violation.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace

from infra.chaos.checks.violations import Kind, Violation
from infra.chaos.fault_context import Scene, Steps, delete_records, delete_topic, set_topic_config
from infra.harness.deployment import set_up
from infra.harness.run import Trial
from infra.harness.supervisor import ABORTED
from infra.harness.workload import Habits, Traffic
from infra.kafka.topics import ensure_topics

Harm = Callable[[Trial], None]
FEED_S, OUTCOME_S, LOOK_S = 8.0, 90.0, 0.5
USERS = 100
DISKS = ("kept", "empty")


def truncated(scene: Scene) -> Steps:
    """The first half of the changelog's records is deleted."""
    yield from _tried(scene, "truncated", lambda trial: _cut(trial, 0.5))


def emptied(scene: Scene) -> Steps:
    """All records of the changelog are deleted."""
    yield from _tried(scene, "emptied", lambda trial: _cut(trial, 1.0))


def recreated(scene: Scene) -> Steps:
    """The changelog is deleted and created again."""
    yield from _tried(scene, "recreated", _recreate)


def _tried(scene: Scene, name: str, harm: Harm) -> Steps:
    for disk in DISKS:
        app = f"{scene.stage.settings.app_id}-{name}-{disk}-{scene.dice.randrange(10**6)}"
        stage = set_up(scene.folder / app, scene.broker.bootstrap_servers, app)
        traffic = Traffic(stage.settings, scene.dice.randrange(2**31), users=USERS, habits=Habits(rate=200))
        with Trial(stage) as trial:
            traffic.start()
            try:
                yield from _one(scene, trial, traffic, f"changelog {name}, disk {disk}", harm, cold=disk == "empty")
            finally:
                traffic.stop()


def _one(scene: Scene, trial: Trial, traffic: Traffic, what: str, harm: Harm, *, cold: bool) -> Steps:
    trial.fleet.scale(1)
    yield from _passing(trial, FEED_S)
    traffic.calm(10)
    trial.rest(30)
    trial.fleet.stop()
    harm(trial)
    if cold:
        shutil.rmtree(trial.stage.data_dir(0))
    committed = trial.gatherer.committed()
    traffic.habits = replace(traffic.habits, rate=200.0)
    trial.fleet.scale(1)
    yield from _passing(trial, 3.0)
    traffic.calm(10)
    yield from _outcome(scene, trial, what, committed)


def _passing(trial: Trial, seconds: float) -> Steps:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        trial.fleet.tick()
        yield LOOK_S / 2


def _outcome(scene: Scene, trial: Trial, what: str, committed: dict[int, int]) -> Steps:
    """Whether it refused, or went on with every law kept."""
    until_s = time.monotonic() + OUTCOME_S
    while time.monotonic() < until_s:
        refusals = [each for each in trial.fleet.exits if each.code == ABORTED and "changelog" in each.last_words]
        if len(refusals) >= 2:
            scene.say(f"{what}: refused, {refusals[-1].last_words.split('stopping: ')[-1][:150]}")
            if trial.gatherer.committed() != committed:
                scene.found.append(Violation(Kind.COMMITTED_AHEAD, None, -1, -1, f"{what}: refused, yet it committed"))
            return
        if trial.rest(2.0):
            violations = trial.judge().violations
            scene.say(f"{what}: went on, {len(violations)} violations")
            scene.found += [replace(each, detail=f"{what}: {each.detail}") for each in violations]
            return
        yield LOOK_S
    words = trial.fleet.exits[-1].last_words if trial.fleet.exits else "it said nothing"
    scene.found.append(Violation(Kind.UNSEEN_STALL, None, -1, -1, f"{what}: neither refused nor went on: {words}"))


def _cut(trial: Trial, fraction: float) -> None:
    """Delete records from the beginning of each partition on, up to a fraction of its length.

    Kafka refuses that for a compacted topic, so somebody must have changed its policy: here, for a moment.
    """
    topic, servers = trial.stage.settings.changelog_topic, trial.stage.settings.kafka.bootstrap_servers
    ends = trial.gatherer.ends(topic)
    set_topic_config(servers, topic, {"cleanup.policy": "delete"})
    delete_records(servers, topic, {number: int(end * fraction) for number, end in ends.items()})
    set_topic_config(servers, topic, {"cleanup.policy": "compact"})


def _recreate(trial: Trial) -> None:
    topic, servers = trial.stage.settings.changelog_topic, trial.stage.settings.kafka.bootstrap_servers
    delete_topic(servers, topic)
    time.sleep(1.0)
    ensure_topics(trial.stage.settings)
    trial.gatherer.begin_anew(topic)
