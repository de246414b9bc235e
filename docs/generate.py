"""Write docs/settings.md and docs/metrics.md from the code: `python docs/generate.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from streams.config.groups import Group
from streams.config.settings import CONFIG_VARIABLE, Settings, secret_keys, variable
from streams.telemetry.metrics import Histogram, Metrics

DOCS = Path(__file__).parent


def pages() -> dict[str, str]:
    """File name -> content of each generated page."""
    return {"settings.md": _settings(), "metrics.md": _metrics()}


def _settings() -> str:
    secrets = " and ".join(f"`{variable(key)}_FILE`" for key in secret_keys())
    head = f"""# Settings

Made from `streams/config/groups.py` and `settings.py` by `python docs/generate.py`.

A value comes from its environment variable, else from the TOML file that `--config` or `{CONFIG_VARIABLE}` names, else
it is the default. A key `kafka.poll_records_max` stands in the file as `poll_records_max` under `[kafka]`, and its
variable is `{variable("kafka.poll_records_max")}`. Unknown keys and unknown `STREAMFORMER_*` variables are errors, and
all errors are told at once. `streamformer settings` prints what would be used, secrets as asterisks.

Secrets may stand in files of their own, named by {secrets}.
"""
    return "\n".join([head, *_table("General", None, Settings), *_groups()])


def _groups() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, Group):
            yield from _table(f"`{name}`: {(model.__doc__ or '').strip()}", name, model)


def _table(title: str, group: str | None, model: Any) -> Iterator[str]:
    yield f"## {title}\n"
    yield "| key | variable | default | |"
    yield "| --- | --- | --- | --- |"
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Group):
            continue
        key = f"{group}.{name}" if group else name
        text = " ".join((field.description or "").split())
        yield f"| `{key}` | `{variable(key)}` | {_default(field)} | {text} |"
    yield ""


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return {"gethostname": "the host's name"}[field.default_factory.__name__]
    text = "" if field.default is None else str(field.default)
    return f"`{text}`" if text else ""


def _metrics() -> str:
    head = """# Metrics

Made from `streams/telemetry/metrics.py` by `python docs/generate.py`.

A worker serves them at `/metrics` of its web address (`web.host`, `web.port`). Beside it, `/livez` answers 503 when the
worker makes no progress, `/readyz` while it restores or cannot encode. Labels never hold users.

| name | kind | labels | |
| --- | --- | --- | --- |"""
    return "\n".join([head, *map(_row, Metrics()), ""])


def _row(instrument: Any) -> str:
    labels = ", ".join(f"`{label}`" for label in instrument.labels)
    text = instrument.help
    if isinstance(instrument, Histogram):
        text += f" Buckets: {', '.join(f'{bound:g}' for bound in instrument.bounds)}."
    return f"| `{instrument.name}` | {instrument.kind} | {labels} | {text} |"


if __name__ == "__main__":
    for file, content in pages().items():
        (DOCS / file).write_text(content, encoding="utf-8")
