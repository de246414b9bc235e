"""`streamformer worker`: verify the topics, then run a worker."""

from __future__ import annotations

import typer

from infra.kafka.topics import verify_topics
from streams.cli import BootstrapServers, Config, run_worker, settings_of


def worker(config: Config = None, bootstrap_servers: BootstrapServers = None) -> None:
    """Run a worker until SIGTERM: read actions, keep sequences, publish embeddings."""
    settings = settings_of(config, bootstrap_servers)
    verify_topics(settings)
    raise typer.Exit(run_worker(settings))
