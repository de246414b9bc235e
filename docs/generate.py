"""Write the generated pages of docs/reference from the code: `python docs/generate.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from infra.cli import COMMANDS, load
from streams.config.groups import Group
from streams.config.settings import CONFIG_VARIABLE, Settings, secret_keys, variable
from streams.telemetry.metrics import Histogram, Metrics

DOCS = Path(__file__).resolve().parent


def pages() -> dict[str, str]:
    """Return the content of each generated page by its path under docs/."""
    return {
        "reference/settings.md": _settings(),
        "reference/metrics.md": _metrics(),
        "reference/cli.md": _cli(),
    }


# Settings -------------------------------------------------------------------------------------------------------------


def _settings() -> str:
    secrets = " and ".join(f"`{variable(key)}_FILE`" for key in secret_keys())
    head = f"""# Settings

Generated from `streams/config/` by `python docs/generate.py`; edit the docstrings there.

Each value is taken from the first of these that has it: the environment variable, the TOML file that `--config` or
`{CONFIG_VARIABLE}` names, the default. In the file the key `kafka.poll_records_max` is written as `poll_records_max`
under `[kafka]`; its variable is `{variable("kafka.poll_records_max")}`. Unknown keys and unknown `STREAMFORMER_*`
variables are errors, and all errors are reported at once.

`streamformer settings` prints the values in force, with secrets masked. To keep a secret in a file of its own, name the
file in {secrets}.
"""
    return "\n".join([head, *_table("General", None, Settings), *_groups()])


def _groups() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, Group):
            yield from _table(f"`{name}`: {(model.__doc__ or '').strip()}", name, model)


def _table(title: str, group: str | None, model: Any) -> Iterator[str]:
    yield f"## {title}\n"
    yield "| key | variable | default | description |"
    yield "| --- | --- | --- | --- |"
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Group):
            continue
        key = f"{group}.{name}" if group else name
        yield _row(f"`{key}`", f"`{variable(key)}`", _setting_default(field), field.description or "")
    yield ""


def _setting_default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return {"gethostname": "the host's name"}[field.default_factory.__name__]
    return _code(field.default)


# Metrics --------------------------------------------------------------------------------------------------------------


def _metrics() -> str:
    head = """# Metrics

Generated from `streams/telemetry/metrics.py` by `python docs/generate.py`; edit the help texts there.

A worker serves its metrics at `/metrics` of its web address (`web.host`, `web.port`). Labels never contain user ids, so
the number of series is bounded. [Operate a worker](../guides/operate.md) names the few to watch.

| name | kind | labels | description |
| --- | --- | --- | --- |"""
    return "\n".join([head, *map(_instrument, Metrics()), ""])


def _instrument(instrument: Any) -> str:
    labels = ", ".join(f"`{label}`" for label in instrument.labels)
    text = instrument.help
    if isinstance(instrument, Histogram):
        text += f" Buckets: {', '.join(f'{bound:g}' for bound in instrument.bounds)}."
    return _row(f"`{instrument.name}`", instrument.kind, labels, text)


# Commands -------------------------------------------------------------------------------------------------------------


def _cli() -> str:
    head = """# Command line

Generated from the commands' own help by `python docs/generate.py`. Every command also answers `--help`.

Every command exits with 0 on success and with 1 on a known error, which is one line on standard error. A wrong option
exits with 2. `streamformer worker` has more exit codes: see [Operate a worker](../guides/operate.md#exit-codes). The
`make` targets are listed in [CONTRIBUTING](../../CONTRIBUTING.md#make-targets).
"""
    sections = [
        line
        for name, entry in sorted(COMMANDS.items())
        for line in _command(load(name, entry), f"streamformer {name}", entry.extra)
    ]
    return "\n".join([head, *sections])


def _command(command: Any, path: str, extra: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        for name, child in sorted(command.commands.items()):
            yield from _command(child, f"{path} {name}", extra)
        return
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join([path, *map(_placeholder, arguments), *(["[OPTIONS]"] if options else [])])
    yield f"## {path}\n"
    yield f"```\n{usage}\n```\n"
    yield f"{' '.join((command.help or '').split())}\n"
    if extra:
        yield f"Needs `pip install 'streamformer[{extra}]'`.\n"
    if command.params:
        yield "| argument or option | default | description |"
        yield "| --- | --- | --- |"
        yield from (_row(_name(p), _option_default(p), _help(p)) for p in [*arguments, *options])
        yield ""


def _placeholder(argument: Any) -> str:
    name = (argument.metavar or argument.name).upper()
    return name if argument.required else f"[{name}]"


def _name(param: Any) -> str:
    if param.param_type_name == "argument":
        return f"`{_placeholder(param)}`"
    return ", ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])


def _option_default(param: Any) -> str:
    if param.required:
        return "required"
    default = param.default() if callable(param.default) else param.default
    if isinstance(default, Path) and default.is_absolute():
        default = default.relative_to(DOCS.parent)
    return "" if default is False else _code(default)


def _help(param: Any) -> str:
    text = param.help or ""
    return f"{text} Also read from `{param.envvar}`.".strip() if param.envvar else text


# Tables ---------------------------------------------------------------------------------------------------------------


def _row(*cells: str) -> str:
    return f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |"


def _code(default: Any) -> str:
    text = "" if default is None else str(default)
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    for file, content in pages().items():
        (DOCS / file).write_text(content, encoding="utf-8")
