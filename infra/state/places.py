"""The places at which a source topic can be begun: an end of the log, a time, offsets, or where the state is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime

import aiokafka
from aiokafka.structs import TopicPartition

from infra.errors import InfraError
from infra.state.logs import Application
from streams.storage.codec import CheckpointMark

OFFSETS = re.compile(r"\d+:\d+(,\d+:\d+)*")
HELP = (
    "`earliest`, `latest`, a time (ISO 8601, or milliseconds since 1970), offsets as PARTITION:OFFSET,..., or `marks`: "
    "where the state is, if only the number of partitions of the same topic has changed."
)


async def places(app: Application, where: str, marks: Mapping[int, CheckpointMark | None]) -> dict[int, int]:
    """Return the offset at which each partition of the source topic begins; raise `InfraError` for another text.

    `marks` are those of the old state, by its partitions.
    """
    topic = app.settings.topics.actions
    tps = [TopicPartition(topic, number) for number in app.partitions(topic)]
    async with aiokafka.AIOKafkaConsumer(isolation_level="read_committed", **app.client) as consumer:
        begins, ends = await consumer.beginning_offsets(tps), await consumer.end_offsets(tps)
        if where == "earliest":
            chosen = dict(begins)
        elif where == "latest":
            chosen = dict(ends)
        elif where == "marks":
            chosen = {tp: _at_mark(app, marks.get(tp.partition), begins[tp]) for tp in tps}
        elif OFFSETS.fullmatch(where):
            given = {
                int(number): int(offset) for number, _, offset in (each.partition(":") for each in where.split(","))
            }
            chosen = {tp: given.get(tp.partition, -1) for tp in tps}
        else:
            found = await consumer.offsets_for_times(dict.fromkeys(tps, _milliseconds(where)))
            chosen = {tp: each.offset if (each := found[tp]) is not None else ends[tp] for tp in tps}
    for tp, offset in chosen.items():
        if not begins[tp] <= offset <= ends[tp]:
            raise InfraError(
                f"partition {tp.partition} of {topic} cannot begin at offset {offset}",
                f"it has the offsets {begins[tp]} to {ends[tp]}",
                "choose a place for every partition within its log",
            )
    return {tp.partition: offset for tp, offset in chosen.items()}


def _at_mark(app: Application, mark: CheckpointMark | None, begin: int) -> int:
    """Return the mark's offset; a partition that the old state does not have begins at its first record."""
    if mark is None:
        return begin
    held, found = mark.identity, app.identity
    if held is None or held.source_topic_id != found.source_topic_id:
        raise InfraError(
            "the state cannot begin at its own marks",
            f"they are not known to be offsets of {found.source_topic} with id {found.source_topic_id}",
            "choose another place with --at",
        )
    return max(begin, mark.source_offset)


def _milliseconds(text: str) -> int:
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise InfraError(f"{text!r} is not a place in a topic", "", f"give {HELP}") from None
    return int((at if at.tzinfo else at.astimezone()).timestamp() * 1000)
