"""Expected failures of a command or worker, told in one line: what happened, the detail, what to do."""

from __future__ import annotations


class StreamformerError(Exception):
    """Ends the command with its text on standard error and a non-zero exit code; never a traceback."""

    def __init__(self, what: str, detail: str, remedy: str) -> None:
        super().__init__(f"{what}: {' '.join(detail.split())}; {remedy}")


class BrokerUnreachable(StreamformerError):
    """No broker answers at the address of the settings, or it refuses this client: check the address, or retry."""


class SettingsError(StreamformerError):
    """The settings do not hold; every problem is in `problems`, one line each with its key."""

    def __init__(self, problems: list[str]) -> None:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__("wrong settings", count, "see docs/reference/settings.md")
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join([f"{super().__str__()}:", *(f"  {problem}" for problem in self.problems)])
