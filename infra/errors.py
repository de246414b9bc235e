"""What a command of `infra` reports in one line."""

from __future__ import annotations

from streams.errors import StreamformerError


class InfraError(StreamformerError):
    """An expected failure of the surroundings: network, disk, port, broker, input file."""


def detail(error: BaseException) -> str:
    """The text of a foreign error, or its name where it has none."""
    return str(error) or type(error).__name__
