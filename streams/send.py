"""`streamformer send`: one action from options, or many from JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from typing import Annotated

import typer

from streams.config.settings import Settings
from streams.options import BootstrapServers, Config, settings_of
from streams.producer import ActionProducer, ActionRejected
from streams.wire.actions import DecodeLimits

app = typer.Typer()
STDIN = "-"
PROGRESS_EVERY_S = 2.0


@app.command()
def send(  # noqa: PLR0913 - one parameter per option
    user: Annotated[
        str | None, typer.Argument(help="User id, or - to read one JSON action per line from standard input.")
    ] = None,
    item: Annotated[str | None, typer.Argument(help="Item id.")] = None,
    config: Config = None,
    bootstrap_servers: BootstrapServers = None,
    action: Annotated[str, typer.Option(help="Action type.")] = "view",
    surface: Annotated[str | None, typer.Option(help="Where the user acted.")] = None,
    duration_ms: Annotated[int | None, typer.Option(help="How long the action took.")] = None,
    timestamp_ms: Annotated[int | None, typer.Option(help="Event time; default: now.")] = None,
    event_id: Annotated[str | None, typer.Option(help="Actions with one id count once; default: random.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Send an action, or JSON lines from standard input, after the checks that a worker makes."""
    settings = settings_of(config, bootstrap_servers)
    if user == STDIN:
        options = (item, surface, duration_ms, timestamp_ms, event_id)
        if any(option is not None for option in options):
            raise typer.BadParameter("lines from standard input hold every field; give - and no item or field")
        raise typer.Exit(_send_lines(settings, as_json))
    if user is None or item is None:
        raise typer.BadParameter("give a user and an item, or - to read JSON lines from standard input")
    with _producer(settings) as producer:
        receipt = producer.send(
            user,
            item,
            action,
            timestamp_ms=timestamp_ms,
            surface=surface,
            duration_ms=duration_ms,
            event_id=event_id,
        )
    if as_json:
        place = {"event_id": receipt.event_id, "partition": receipt.partition, "offset": receipt.offset}
        print(json.dumps({"sent": 1, "rejected": 0, **place}))
    else:
        print(f"sent to partition {receipt.partition} at offset {receipt.offset}, event id {receipt.event_id}")


def _producer(settings: Settings) -> ActionProducer:
    options = settings.kafka.client_options()
    limits = DecodeLimits(**settings.decode.model_dump())
    servers = options.pop("bootstrap_servers")
    return ActionProducer(servers, topic=settings.topics.actions, limits=limits, client=options)


def _send_lines(settings: Settings, as_json: bool) -> int:
    """Send the lines of standard input and print the counts; return the exit code."""
    with _producer(settings) as producer:
        try:
            _send_each(sys.stdin.buffer, producer, quiet=as_json)
        finally:
            counts = {"sent": producer.acknowledged, "rejected": producer.rejected}
            print(json.dumps(counts) if as_json else f"{counts['sent']:,} sent, {counts['rejected']:,} rejected")
    return 1 if producer.rejected else 0


def _send_each(lines: Iterable[bytes], producer: ActionProducer, *, quiet: bool = False) -> None:
    """Send every valid line; report the others, and unless `quiet` also progress, on standard error."""
    reported_s = time.monotonic()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            producer.send_json(line.strip())
        except ActionRejected as error:
            print(f"line {number}: {error}", file=sys.stderr)
        if not quiet and time.monotonic() - reported_s >= PROGRESS_EVERY_S:
            reported_s = time.monotonic()
            print(f"{producer.acknowledged:,} sent", file=sys.stderr)
    producer.flush()
