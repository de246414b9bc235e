"""What a command of `infra` reports in one line: what happened, the detail, what to do."""

from __future__ import annotations


class InfraError(Exception):
    """An expected failure of the surroundings (network, disk, port, broker, input file); the text is for people."""

    def __init__(self, what: str, detail: str, remedy: str) -> None:
        super().__init__(f"{what}: {' '.join(detail.split())}; {remedy}")


def detail(error: BaseException) -> str:
    """The text of a foreign error, or its name where it has none."""
    return str(error) or type(error).__name__
