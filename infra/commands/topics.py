"""`streamformer topics`: create missing topics and verify existing ones."""

from __future__ import annotations

from typing import Annotated

import typer

from infra.kafka.topics import ensure_topics, topics_of, verify_topics
from streams.options import BootstrapServers, Config, settings_of

Replication = Annotated[int, typer.Option(min=1, help="Replicas of each partition of a new topic.")]

app = typer.Typer(name="topics", help="Create or verify the topics.", no_args_is_help=True)


@app.command()
def create(
    config: Config = None, bootstrap_servers: BootstrapServers = None, replication_factor: Replication = 1
) -> None:
    """Create missing topics, then verify all. A topic of another shape is reported, never changed."""
    settings = settings_of(config, bootstrap_servers)
    created = ensure_topics(settings, replication_factor=replication_factor)
    for topic in topics_of(settings):
        print(f"{'created' if topic.name in created else 'present'}  {topic.name}")


@app.command()
def verify(config: Config = None, bootstrap_servers: BootstrapServers = None) -> None:
    """Verify that every topic has the partition count and the cleanup policy that the code relies on."""
    settings = settings_of(config, bootstrap_servers)
    verify_topics(settings)
    for topic in topics_of(settings):
        print(f"as it must be  {topic.name}")
