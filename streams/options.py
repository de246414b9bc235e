"""Options that several commands share, and the settings that they select."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streams.config.settings import Settings, load_settings

Config = Annotated[Path | None, typer.Option(help="TOML file with settings; default: STREAMFORMER_CONFIG.")]
BootstrapServers = Annotated[
    str | None,
    typer.Option(help="Address of the broker, instead of the one in the settings.", envvar="KAFKA_BOOTSTRAP_SERVERS"),
]


def settings_of(config: Path | None, bootstrap_servers: str | None = None) -> Settings:
    """Return the settings, with the given address if there is one; raise `SettingsError`."""
    settings = load_settings(config)
    if not bootstrap_servers:
        return settings
    kafka = settings.kafka.model_copy(update={"bootstrap_servers": bootstrap_servers})
    return settings.model_copy(update={"kafka": kafka})
