"""Options that several commands share, and the settings that they select."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from streams.config.settings import Settings, load_settings

Config = Annotated[Path | None, typer.Option(help="TOML file with settings; default: STREAMFORMER_CONFIG.")]
BootstrapServers = Annotated[
    str | None,
    typer.Option(help="Address of the broker, instead of the one in the settings.", envvar="KAFKA_BOOTSTRAP_SERVERS"),
]
Release = Annotated[Path | None, typer.Option(help="Folder of the release, over `encoder.release_dir`.")]


def settings_of(config: Path | None, bootstrap_servers: str | None = None, release: Path | None = None) -> Settings:
    """Return the settings, with the given address and release if there are any; raise `SettingsError`."""
    settings = load_settings(config)
    changed: dict[str, BaseModel] = {}
    if bootstrap_servers:
        changed["kafka"] = settings.kafka.model_copy(update={"bootstrap_servers": bootstrap_servers})
    if release is not None:
        changed["encoder"] = settings.encoder.model_copy(update={"release_dir": release})
    return settings.model_copy(update=changed)
