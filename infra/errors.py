"""Errors of the commands in `infra`."""

from __future__ import annotations

from encoder.errors import StreamformerError


class InfraError(StreamformerError):
    """The surroundings failed: network, disk, port, broker or input file."""


def detail(error: BaseException) -> str:
    """Return the text of an error of another library, or its class name where it has no text."""
    return str(error) or type(error).__name__
