"""Faults of the broker and of the output topic."""

from __future__ import annotations

import os
import signal

from infra.chaos.fault_context import Scene, Steps, delete_topic, set_topic_config
from infra.kafka.topics import ensure_topics


def killed(scene: Scene) -> Steps:
    """kill -9, and a start on the same data after a moment."""
    scene.broker.kill()
    yield scene.dice.uniform(0.2, 4.0)
    yield from scene.restart_broker()


def bounced(scene: Scene) -> Steps:
    """An orderly restart."""
    yield from scene.restart_broker()


def frozen(scene: Scene) -> Steps:
    """SIGSTOP for 30 s: connections stand, nothing answers."""
    os.kill(scene.broker.pid, signal.SIGSTOP)
    try:
        yield 30.0
    finally:
        os.kill(scene.broker.pid, signal.SIGCONT)


def output_refused(scene: Scene) -> Steps:
    """The output topic takes no record for some seconds: its limit is below any record's size."""
    servers, topic = scene.broker.bootstrap_servers, scene.stage.settings.topics.embeddings
    set_topic_config(servers, topic, {"max.message.bytes": "20"})
    try:
        yield scene.dice.uniform(6.0, 12.0)
    finally:
        set_topic_config(servers, topic, {"max.message.bytes": str(1 << 20)})


def output_recreated(scene: Scene) -> Steps:
    """The output topic is deleted at a moment of rest, and created again some seconds later, empty."""
    servers, topic = scene.broker.bootstrap_servers, scene.stage.settings.topics.embeddings
    habits = scene.traffic.habits
    scene.traffic.calm(20)
    scene.trial.rest(30)
    delete_topic(servers, topic)
    scene.trial.gatherer.begin_anew(topic)
    scene.traffic.habits = habits
    try:
        yield scene.dice.uniform(4.0, 8.0)
    finally:
        ensure_topics(scene.stage.settings)
