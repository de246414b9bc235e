"""Send difficult input: strange records, huge ones, duplicates, disorder, transactions, compression."""

from __future__ import annotations

from typing import Any

from infra.chaos.fault_context import FaultContext, Steps, set_topic_config
from infra.harness.workload import CODECS

SECONDS = (8.0, 12.0)


def poison(context: FaultContext) -> Steps:
    """Make one record in ten strange: no action, damaged, misplaced, with odd headers, or an unclear deletion."""
    yield from _with(context, poison=0.1)


def oversized(context: FaultContext) -> Steps:
    """Send some records above the limit of a value, up to almost the limit of the broker (over 1 MB)."""
    yield from _with(context, oversized=0.003)


def disordered(context: FaultContext) -> Steps:
    """Send one event in five twice and one in three late, with tombstones in between."""
    yield from _with(context, duplicates=0.2, disorder=0.33, tombstones=0.01)


def transactional(context: FaultContext) -> Steps:
    """Produce in transactions and abort one in five: control records leave gaps between offsets."""
    yield from _with(context, transactional=True)


def compressed(context: FaultContext) -> Steps:
    """Compress the input with each codec in turn, and let the broker compress what the workers write."""
    names, codecs = context.deployment.settings.topics, [*CODECS]
    topics = (names.embeddings, names.dead_letter, context.deployment.settings.changelog_topic)
    context.rng.shuffle(codecs)
    try:
        for topic, codec in zip(topics, codecs, strict=False):
            set_topic_config(context.servers, topic, {"compression.type": codec})
        yield from _with(context, compressed=True, poison=0.02)
    finally:
        for topic in topics:
            set_topic_config(context.servers, topic, {"compression.type": "producer"})


def _with(context: FaultContext, **options: Any) -> Steps:
    with context.workload.changed(**options):
        yield context.rng.uniform(*SECONDS)
