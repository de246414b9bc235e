"""The commands of `streams`, mounted by the console script `streamformer`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Annotated

import typer
from rich.console import Console

from streams.config.settings import Settings, ignored_variables, printed
from streams.options import BootstrapServers, Config, settings_of
from streams.subscriber import EmbeddingSubscriber, FeatureSubscriber
from streams.subscriber.lines import AnyChange, as_json, lines_of

app = typer.Typer()


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
    from_beginning: Annotated[bool, typer.Option(help="Begin with the records that the topic already holds.")] = False,
    features: Annotated[bool, typer.Option("--features", help="Print features instead of embeddings.")] = False,
    user: Annotated[str | None, typer.Option(help="Print only this user.")] = None,
    count: Annotated[int, typer.Option(min=0, help="Number of records to print; 0 is unlimited.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line, with whole vectors.")] = False,
) -> None:
    """Print embeddings or features as they come, until Ctrl-C."""
    settings = settings_of(config, bootstrap_servers)
    with _subscriber(settings, features, from_beginning) as subscriber:
        changes = islice((change for change in subscriber if user is None or change.user == user), count or None)
        try:
            _print_all(changes, json)
        except KeyboardInterrupt:
            pass
        except BrokenPipeError:  # the reader of our lines has ended; keep the interpreter from flushing to it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _subscriber(settings: Settings, features: bool, from_beginning: bool) -> EmbeddingSubscriber | FeatureSubscriber:
    options = settings.kafka.client_options()
    servers = options.pop("bootstrap_servers")
    if features:
        return FeatureSubscriber(servers, topic=settings.topics.features, from_beginning=from_beginning, client=options)
    return EmbeddingSubscriber(servers, topic=settings.topics.embeddings, from_beginning=from_beginning, client=options)


def _print_all(changes: Iterable[AnyChange], json: bool) -> None:
    console = Console()
    for change in changes:
        if json:
            print(as_json(change), flush=True)
            continue
        for line in lines_of(change):
            if console.is_terminal:
                console.print(line, no_wrap=True, overflow="ellipsis", crop=True)
            else:
                print(line.plain, flush=True)
