"""Errors by consequence: the base class states what the caller does about an error.

Code that handles errors catches one of the five consequences; code that raises picks the one that fits. The text holds
the rest: what happened, the detail, what to do.
"""

from __future__ import annotations

from encoder.errors import StreamformerError

__all__ = [
    "BrokerUnreachable",
    "CannotStart",
    "HaltsPartition",
    "LosesPartition",
    "RebuildsPartition",
    "SettingsError",
    "StopsWorker",
    "StreamformerError",
]


class CannotStart(StreamformerError):
    """The command or worker cannot begin; its surroundings or settings have to change first. Nothing was done."""


class StopsWorker(StreamformerError):
    """The worker must end at once: continuing would risk an event. Its successor continues from the last checkpoint."""


class HaltsPartition(StreamformerError):
    """One partition cannot go on, and others can: halt it, report it, and try again later."""

    retriable = True
    """False if trying again cannot help: an operator has to decide."""


class LosesPartition(StreamformerError):
    """Another worker owns the partition: drop it without a write. Other partitions are unaffected."""


class RebuildsPartition(StreamformerError):
    """The local copy of a partition is damaged: delete it and rebuild it from the changelog."""


class BrokerUnreachable(CannotStart):
    """No broker answers at the address in the settings, or it rejects this client."""


class SettingsError(CannotStart):
    """The settings are not valid; `problems` holds one line per problem, with its key."""

    def __init__(self, problems: list[str]) -> None:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__("wrong settings", count, "see docs/reference/settings.md")
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join([f"{super().__str__()}:", *(f"  {problem}" for problem in self.problems)])
