"""`streamformer worker`: verify the topics, then run a worker."""

from __future__ import annotations

import typer

from infra.kafka.topics import verify_topics
from streams.cli import run_worker
from streams.options import BootstrapServers, Config, Release, settings_of

app = typer.Typer()


@app.command()
def worker(
    config: Config = None,
    bootstrap_servers: BootstrapServers = None,
    release: Release = None,
) -> None:
    """Run a worker until SIGTERM: read actions, keep sequences, publish embeddings and features."""
    settings = settings_of(config, bootstrap_servers, release)
    findings = verify_topics(settings, for_worker=True)
    raise typer.Exit(run_worker(settings, warnings=findings.lines()))
