"""The console script `streamformer`: the commands of `infra`, with those of `streams` and `encoder` beside them.

An error that this project defines carries text for people, so that is what is printed, and the exit code is 1; a full
disk and the like are told in the same way. Anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

from infra.commands import broker, replay, topics, worker
from streams.telemetry.memory import keep_freed_memory

MOUNTED = ("streams.cli", "infra.demo.cli", "encoder.cli")
"""Modules whose `app` adds its commands; imported only when one of them is asked for, since torch takes seconds."""

OUR_PACKAGES = ("streams", "encoder", "infra")


class Mounted(TyperGroup):
    """The commands given here, then those of each mounted module."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *(name for module in MOUNTED for name in _commands_of(module))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if own := super().get_command(ctx, cmd_name):
            return own
        candidates = (_commands_of(module).get(cmd_name) for module in MOUNTED)
        return next((command for command in candidates if command), None)


app = typer.Typer(
    cls=Mounted,
    help="User embeddings that are fresh the moment a user acts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(broker.broker)
app.command()(replay.replay)
app.command()(worker.worker)
app.add_typer(topics.app, name="topics")


def main() -> None:
    """Run a command; known errors become one line on standard error and exit code 1."""
    keep_freed_memory()
    for library in (
        "aiokafka",
        "kafka",
    ):  # they log what the one line tells; commands that set up logging still hear it
        logging.getLogger(library).addHandler(logging.NullHandler())
    try:
        app()
    except OSError as error:
        _fail(f"the system refused: {error}; see disk space, permissions and that the file exists")
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in OUR_PACKAGES:
            raise
        _fail(str(error))


def command_names() -> list[str]:
    """The names of all commands."""
    return get_group(app).list_commands(None)  # type: ignore[arg-type]


def _commands_of(module: str) -> dict[str, Any]:
    """The commands of a module's Typer application, by name."""
    return dict(get_group(importlib.import_module(module).app).commands)


def _fail(text: str) -> None:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
