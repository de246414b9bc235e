"""Folder of downloads that are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from infra.errors import InfraError


def cache_dir() -> Path:
    """Return the project's folder under `XDG_CACHE_HOME` (default `~/.cache`), created if missing."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamformer"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InfraError(
            "cannot create the cache folder", str(error), "set XDG_CACHE_HOME to a folder you own"
        ) from error
    return path
