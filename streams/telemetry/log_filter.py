"""A log filter that limits repeated lines to one per second.

Client libraries log the same line hundreds of times per second while a broker is away. Two lines are the same when they
have the same logger, level and place in the code; their arguments may differ. The first line after a pause ends with
the number of lines that were left out.
"""

from __future__ import annotations

import logging

PER_MS = 1_000


class RepeatFilter(logging.Filter):
    """Passes each line once per `PER_MS`, by the record's own time, and every line of the package `exempt`."""

    def __init__(self, exempt: str) -> None:
        super().__init__()
        self._exempt = exempt
        self._last_ms: dict[tuple[str, int, str, int], float] = {}
        self._left_out: dict[tuple[str, int, str, int], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged."""
        if record.name.split(".", 1)[0] == self._exempt:
            return True
        place, at_ms = (record.name, record.levelno, record.pathname, record.lineno), record.created * 1_000
        if at_ms - self._last_ms.get(place, -PER_MS) < PER_MS:
            self._left_out[place] = self._left_out.get(place, 0) + 1
            return False
        self._last_ms[place] = at_ms
        if left_out := self._left_out.pop(place, 0):
            record.msg, record.args = f"{record.getMessage()} ({left_out} more like it left out)", None
        return True
