"""`streamformer state`: look at the state of the application, verify it, and move it on purpose."""

from __future__ import annotations

import asyncio
import json as json_module
import logging
import sys
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

import typer

from infra.errors import InfraError
from infra.state import inspect, places, rewrite
from infra.state.logs import Application, broker_errors
from streams.config.settings import Settings
from streams.options import BootstrapServers, Config, settings_of

app = typer.Typer(name="state", help="Show, verify, adopt or move the state.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it; without this option only the plan is printed.")]
T = TypeVar("T")
NOT_DONE = "nothing was changed: run it again with --yes to do this"


@app.command()
def show(
    user: Annotated[str, typer.Argument(help="User id.")],
    config: Config = None,
    bootstrap_servers: BootstrapServers = None,
) -> None:
    """Print one user's state as of the last checkpoint, as JSON; ids of items and actions are hashes."""
    settings = settings_of(config, bootstrap_servers)

    async def work() -> dict[str, Any] | None:
        opened = await Application.open(settings)
        opened.require_topics()
        return await inspect.show(opened, user.encode())

    state = _run(work())
    if state is None:
        raise InfraError(
            f"user {user} has no state", f"in {settings.changelog_topic}", "it has not acted, or was a typo"
        )
    print(json_module.dumps(state, indent=2))


@app.command()
def partitions(config: Config = None, bootstrap_servers: BootstrapServers = None, json: Json = False) -> None:
    """Print each partition's position, identity and lag, and why a worker would not start: exit code 1 then."""
    settings = settings_of(config, bootstrap_servers)

    async def work() -> list[dict[str, Any]]:
        opened = await Application.open(settings)
        numbers = opened.partitions(settings.changelog_topic)
        return [inspect.found_as_json(opened, number, await opened.found(number)) for number in numbers]

    rows = _run(work())
    if json:
        print(json_module.dumps(rows))
    for row in [] if json else rows:
        _print_partition(row)
    if not rows or any(row["problem"] for row in rows):
        raise typer.Exit(1)


def _print_partition(row: dict[str, Any]) -> None:
    at, committed = row["state_offset"], row["committed_offset"]
    print(
        f"partition {row['partition']}: state at {'-' if at is None else at}, committed "
        f"{'-' if committed is None else committed}, log {row['earliest_offset']} to {row['end_offset']}, "
        f"lag {row['lag']}"
    )
    identity = row["identity"] or {}
    known = ", ".join(f"{name} {value}" for name, value in identity.items() if value)
    print(f"  identity: {known or 'none'}")
    for operation in row["operations"]:
        print(f"  {operation}")
    for note in row["notes"]:
        print(f"  note: {note}")
    if row["problem"]:
        print(f"  problem: {row['problem']}")


@app.command()
def verify(config: Config = None, bootstrap_servers: BootstrapServers = None, json: Json = False) -> None:
    """Read the whole changelog: checksums, marks, order, and every user; exit code 1 if anything is wrong."""
    settings = settings_of(config, bootstrap_servers)

    async def work() -> list[inspect.Checked]:
        opened = await Application.open(settings)
        opened.require_topics()
        return [await inspect.verify(opened, number) for number in opened.partitions(settings.changelog_topic)]

    checked = _run(work())
    for each in checked:
        for problem in [] if json else each.problems:
            print(f"partition {each.partition}: {problem}")
    names = ("records", "deleted", "marks", "users", "forgotten", "actions", "problem_count")
    totals = {name: sum(getattr(each, name) for each in checked) for name in names}
    if json:
        print(json_module.dumps({**totals, "problems": [problem for each in checked for problem in each.problems]}))
    else:
        print(
            ", ".join(
                f"{value} {name.replace('_count', 's').replace('deleted', 'deletions')}"
                for name, value in totals.items()
            )
        )
    if totals["problem_count"]:
        raise typer.Exit(1)


@app.command()
def adopt(
    at: Annotated[str, typer.Option(help=f"Where to begin in the source topic: {places.HELP}")],
    from_app: Annotated[
        str, typer.Option(help="Application id whose state is adopted; default: `app_id` of the settings.")
    ] = "",
    config: Config = None,
    bootstrap_servers: BootstrapServers = None,
    yes: Yes = False,
) -> None:
    """Keep every user's sequence, and begin at a chosen place of the source topic in the settings.

    Use it after the source topic was created again, renamed or mirrored. With --from-app the state moves to another
    application id, whose topics may have another number of partitions. Events before the chosen place that the state
    already contains are applied again if they come again, unless they have event ids. Workers must be stopped.
    """
    settings = settings_of(config, bootstrap_servers)
    plan = _run(_adoption(settings, from_app, at))
    rewrite.check_adoption(plan)
    print(f"state of {plan.old.settings.app_id}, {plan.old.settings.changelog_topic}:")
    for number, mark in plan.marks.items():
        source = mark.identity.source_topic_id if mark and mark.identity else "unknown"
        print(f"  partition {number}: offset {mark.source_offset if mark else '-'} of topic id {source}")
    identity = plan.new.identity
    print(f"begins in {identity.source_topic} (topic id {identity.source_topic_id}), {settings.changelog_topic}:")
    for number, offset in plan.places.items():
        print(f"  partition {number}: offset {offset}")
    if not yes:
        print(NOT_DONE)
        return
    print(f"{_run(rewrite.adopt(plan, print))} users adopted")


async def _adoption(settings: Settings, from_app: str, at: str) -> rewrite.Adoption:
    new = await Application.open(settings)
    new.require_topics()
    old = await Application.open(settings.model_copy(update={"app_id": from_app})) if from_app else new
    marks = {number: await old.last_mark(number) for number in old.partitions(old.settings.changelog_topic)}
    command = f"streamformer state adopt --at {at}" + (f" --from-app {from_app}" if from_app else "")
    return rewrite.Adoption(old, new, marks, await places.places(new, at, marks), command)


@app.command()
def skip(
    partition: Annotated[int, typer.Option(min=0, help="Number of the partition.")],
    to: Annotated[int, typer.Option(min=0, help="Offset at which it continues.")],
    config: Config = None,
    bootstrap_servers: BootstrapServers = None,
    yes: Yes = False,
) -> None:
    """Let one partition continue at another offset of its log: skip events, read them again, or follow a truncation.

    The move is recorded in the state and printed by `streamformer state partitions`. Workers must be stopped.
    """
    settings = settings_of(config, bootstrap_servers)
    move = _run(_move(settings, partition, to))
    rewrite.check_move(move)
    print(f"partition {partition} of {settings.topics.actions} will {move.describe()}")
    if not yes:
        print(NOT_DONE)
        return
    _run(rewrite.carry_out(move, print))
    print(f"partition {partition} continues at offset {to}")


async def _move(settings: Settings, partition: int, to: int) -> rewrite.Move:
    opened = await Application.open(settings)
    opened.require_topics()
    if partition not in opened.partitions(settings.changelog_topic):
        raise InfraError(f"there is no partition {partition}", "", f"give 0 to {settings.topics.partitions - 1}")
    command = f"streamformer state skip --partition {partition} --to {to}"
    return rewrite.Move(opened, partition, await opened.found(partition), to, command)


def _run(work: Coroutine[Any, Any, T]) -> T:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for library in ("aiokafka", "kafka"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    with broker_errors("the state cannot be read or written"):
        return asyncio.run(work)
