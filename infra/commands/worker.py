"""`streamformer worker`: verify the topics, then run a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infra.kafka.topics import verify_topics
from streams.cli import run_worker
from streams.options import BootstrapServers, Config, settings_of

app = typer.Typer()


@app.command()
def worker(
    config: Config = None,
    bootstrap_servers: BootstrapServers = None,
    release: Annotated[Path | None, typer.Option(help="Folder of the release, over `encoder.release_dir`.")] = None,
) -> None:
    """Run a worker until SIGTERM: read actions, keep sequences, publish embeddings."""
    settings = settings_of(config, bootstrap_servers)
    if release is not None:
        encoder = settings.encoder.model_copy(update={"release_dir": release})
        settings = settings.model_copy(update={"encoder": encoder})
    findings = verify_topics(settings, for_worker=True)
    raise typer.Exit(run_worker(settings, warnings=findings.lines()))
