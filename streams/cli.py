"""The commands of `streams`, mounted by the console script `streamformer`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from streams.config.settings import Settings, ignored_variables, printed
from streams.options import BootstrapServers, Config, settings_of
from streams.subscriber import Change, EmbeddingSubscriber
from streams.subscriber.embeddings import as_json
from streams.wire.embeddings import Tombstone

app = typer.Typer()

NUMBERS_SHOWN = 4


@app.command("settings")
def show_settings(config: Config = None) -> None:
    """Print every setting as it would be used, secrets as asterisks; fail if one is wrong."""
    print(printed(settings_of(config)))


def run_worker(settings: Settings, *, warnings: Sequence[str] = ()) -> int:
    """Run a worker until SIGTERM; return its exit code. The caller has verified the topics and passes its findings."""
    from streams.worker import Worker, log_to_stderr  # torch and Faust take seconds

    log_to_stderr(settings.log_level)
    logger = logging.getLogger(__name__)
    logger.info("settings:\n%s", printed(settings))
    if ignored := ignored_variables():
        logger.info("ignored variables, which Kubernetes injects for a Service: %s", ", ".join(ignored))
    for line in warnings:
        logger.warning("%s", line)
    return Worker(settings).run()


@app.command()
def tail(
    config: Config = None,
    bootstrap_servers: BootstrapServers = None,
    from_beginning: Annotated[
        bool, typer.Option(help="Begin with the embeddings that the topic already holds.")
    ] = False,
    user: Annotated[str | None, typer.Option(help="Print only this user.")] = None,
    count: Annotated[int, typer.Option(min=0, help="Number of lines to print; 0 is unlimited.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line, with whole vectors.")] = False,
) -> None:
    """Print embeddings as they come, until Ctrl-C."""
    settings = settings_of(config, bootstrap_servers)
    options = settings.kafka.client_options()
    with EmbeddingSubscriber(
        options.pop("bootstrap_servers"),
        topic=settings.topics.embeddings,
        from_beginning=from_beginning,
        client=options,
    ) as subscriber:
        changes = (change for change in subscriber if user is None or change.user == user)
        try:
            _print_all(islice(changes, count or None), json)
        except KeyboardInterrupt:
            pass
        except BrokenPipeError:  # the reader of our lines has ended; keep the interpreter from flushing to it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_all(changes: islice[Change], json: bool) -> None:
    console = Console()
    for change in changes:
        if json:
            print(as_json(change), flush=True)
        elif console.is_terminal:
            console.print(_line(change), no_wrap=True, overflow="ellipsis", crop=True)
        else:
            print(_line(change).plain, flush=True)


def _line(change: Change) -> Text:
    """Return a line for people; unprintable characters of the user id are escaped."""
    user = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in change.user)
    if isinstance(change, Tombstone):
        return Text.assemble((user, "bold"), "  ", ("forgotten", "red"), f"  offset {change.source_offset}")
    metadata = change.metadata
    at = datetime.fromtimestamp(metadata.encoded_at_ms / 1000, UTC).strftime("%H:%M:%S.%f")[:-3]
    numbers = " ".join(f"{number:+.3f}" for number in change.vector[:NUMBERS_SHOWN].tolist())
    more = " …" if len(change.vector) > NUMBERS_SHOWN else ""
    return Text.assemble(
        (at, "dim"),
        "  ",
        (user, "bold"),
        f"  {metadata.reason}  {metadata.sequence_length} actions  {metadata.encoder_version}  ",
        (f"[{numbers}{more}]", "cyan"),
    )
