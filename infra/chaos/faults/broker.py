"""Faults of any one broker, and of the output topic."""

from __future__ import annotations

import os
import signal

from infra.chaos.fault_context import FaultContext, Steps, delete_topic, set_topic_config
from infra.kafka.topics import ensure_topics


def killed(context: FaultContext) -> Steps:
    """Kill a broker with SIGKILL, and restart it on the same data after a moment."""
    broker = context.some_broker()
    broker.kill()
    yield context.rng.uniform(0.2, 4.0)
    yield from context.restart(broker)


def bounced(context: FaultContext) -> Steps:
    """Restart a broker in order."""
    yield from context.restart(context.some_broker())


def frozen(context: FaultContext) -> Steps:
    """Freeze a broker with SIGSTOP for 30 s: connections stay open and nothing answers."""
    broker = context.some_broker()
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        yield 30.0
    finally:
        os.kill(broker.pid, signal.SIGCONT)


def output_rejected(context: FaultContext) -> Steps:
    """Make the output topic reject every record for some seconds, by a size limit below that of any record."""
    servers, topic = context.servers, context.deployment.settings.topics.embeddings
    set_topic_config(servers, topic, {"max.message.bytes": "20"})
    try:
        yield context.rng.uniform(6.0, 12.0)
    finally:
        set_topic_config(servers, topic, {"max.message.bytes": str(1 << 20)})


def output_recreated(context: FaultContext) -> Steps:
    """Delete the output topic at rest, and create it again some seconds later, empty."""
    servers, topic = context.servers, context.deployment.settings.topics.embeddings
    options = context.workload.options
    context.workload.calm(20)
    context.run.rest(30)
    delete_topic(servers, topic)
    context.run.reader.restart(topic)
    context.workload.options = options
    try:
        yield context.rng.uniform(4.0, 8.0)
    finally:
        ensure_topics(context.deployment.settings, replication_factor=context.deployment.brokers)
