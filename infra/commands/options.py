"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streams.settings import Settings, load_settings

Config = Annotated[
    Path | None, typer.Option(help="TOML file with settings.", envvar="STREAMFORMER_CONFIG", show_envvar=True)
]
BootstrapServers = Annotated[
    str | None,
    typer.Option(help="Address of the broker, over that of the settings.", envvar="KAFKA_BOOTSTRAP_SERVERS"),
]


def settings_of(config: Path | None, bootstrap_servers: str | None) -> Settings:
    """The settings, at the address that was given if one was; raises `SettingsError`."""
    settings = load_settings(config)
    if not bootstrap_servers:
        return settings
    kafka = settings.kafka.model_copy(update={"bootstrap_servers": bootstrap_servers})
    return settings.model_copy(update={"kafka": kafka})
