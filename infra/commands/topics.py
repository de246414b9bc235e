"""`streamformer topics`: create missing topics and verify existing ones."""

from __future__ import annotations

from typing import Annotated

import typer

from infra.kafka.topics import BROKERS_DEFAULT, TopicMismatch, ensure_topics, topics_of, verify_topics
from streams.options import BootstrapServers, Config, Release, settings_of

Replication = Annotated[
    int | None,
    typer.Option(
        min=1, help="Replicas of each partition of a new topic; default: that of the broker.", show_default=False
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail if a topic is too weak, or could not be verified.")]

app = typer.Typer(name="topics", help="Create or verify the topics.", no_args_is_help=True)


@app.command()
def create(
    config: Config = None,
    bootstrap_servers: BootstrapServers = None,
    replication_factor: Replication = None,
    release: Release = None,
) -> None:
    """Create missing topics, then verify all. A topic of another shape is reported, never changed.

    With feature definitions and no release, in the settings or here, the topic of embeddings is left out.
    """
    settings = settings_of(config, bootstrap_servers, release)
    created = ensure_topics(settings, replication_factor=replication_factor or BROKERS_DEFAULT)
    for topic in topics_of(settings):
        print(f"{'created' if topic.name in created else 'present'}  {topic.name}")
    for line in verify_topics(settings).lines():
        print(line)


@app.command()
def verify(
    config: Config = None,
    bootstrap_servers: BootstrapServers = None,
    strict: Strict = False,
    release: Release = None,
) -> None:
    """Verify that every topic has the partition count and the cleanup policy that the code relies on.

    Topics that work, but would lose records in a failure, are listed too; with --strict they are an error.
    """
    settings = settings_of(config, bootstrap_servers, release)
    findings = verify_topics(settings)
    for topic in topics_of(settings):
        print(f"as it must be  {topic.name}")
    for line in findings.lines():
        print(line)
    if strict and findings.count:
        count = f"{findings.count} finding{'s' if findings.count > 1 else ''}, listed above"
        raise TopicMismatch("the topics are too weak", count, "change the topics, or verify without --strict")
