"""`streamformer topics`: create the missing topics, verify those that exist."""

from __future__ import annotations

from typing import Annotated

import typer

from infra.topics import ensure_topics, topics_of, verify_topics

Bootstrap = Annotated[
    str, typer.Option("--bootstrap-servers", envvar="KAFKA_BOOTSTRAP_SERVERS", help="Address of the broker.")
]
App = Annotated[str, typer.Option(envvar="STREAMFORMER_APP_ID", help="Application id; it names the changelog.")]
Partitions = Annotated[int, typer.Option(min=1, envvar="STREAMFORMER_PARTITIONS", help="Partitions of every topic.")]
Replication = Annotated[int, typer.Option(min=1, help="Replicas of each partition of a topic that is created.")]

app = typer.Typer(help="Create or verify the topics.", no_args_is_help=True)


@app.command()
def create(
    bootstrap_servers: Bootstrap = "127.0.0.1:9092",
    app: App = "streamformer",
    partitions: Partitions = 4,
    replication_factor: Replication = 1,
) -> None:
    """Create what is missing, then verify all; a topic of another shape is refused, not changed."""
    created = ensure_topics(bootstrap_servers, app, partitions, replication_factor=replication_factor)
    for topic in topics_of(app, partitions):
        print(f"{'created' if topic.name in created else 'present'}  {topic.name}")


@app.command()
def verify(
    bootstrap_servers: Bootstrap = "127.0.0.1:9092", app: App = "streamformer", partitions: Partitions = 4
) -> None:
    """Say whether every topic has the partition count and the cleanup policy that the code relies on."""
    verify_topics(bootstrap_servers, app, partitions)
    for topic in topics_of(app, partitions):
        print(f"as it must be  {topic.name}")
