"""`streamformer broker`: a local Kafka, for trying things out."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from infra.kafka.address import BrokerFailed
from infra.kafka.broker import Broker
from infra.kafka.node import BrokerOptions
from infra.signals import interrupt_on_sigterm

app = typer.Typer()
CHECK_S = 0.5


@app.command()
def broker(
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port on loopback; 0 picks a free one.")] = 9092,
    heap_mb: Annotated[int, typer.Option(min=128, help="Java heap, in MB.")] = 512,
    folder: Annotated[
        Path | None, typer.Option(help="Parent of the temporary data folder; default: the system's.")
    ] = None,
) -> None:
    """Run Apache Kafka on loopback until Ctrl-C, then remove its data. Standard output is one line, the address."""
    interrupt_on_sigterm()
    with Broker.start(BrokerOptions(port=port, heap_mb=heap_mb, folder=folder)) as running:
        print(running.bootstrap_servers, flush=True)
        print("Ctrl-C stops it and removes its data", file=sys.stderr)
        try:
            _watch(running)
        except KeyboardInterrupt:
            print("stopping", file=sys.stderr)


def _watch(running: Broker) -> NoReturn:
    while running.is_running():
        time.sleep(CHECK_S)
    raise BrokerFailed("the broker ended by itself", running.last_error(), "check memory and disk, then start it again")
