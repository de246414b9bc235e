"""The root of every error that this project raises on purpose; `streams.errors` and `infra.errors` extend it."""

from __future__ import annotations


class StreamformerError(Exception):
    r"""A failure that the code foresees, in one line of text: what happened, the detail, what to do.

    The command line prints the text and exits with code 1. Any other exception is a defect and keeps its traceback.

    >>> str(StreamformerError("cannot read the log", "no such file:\n a.csv", "check the path"))
    'cannot read the log: no such file: a.csv; check the path'
    """

    def __init__(self, what: str, detail: str = "", remedy: str = "") -> None:
        """Join the parts; `what` may hold the whole line."""
        text = f"{what}: {' '.join(detail.split())}" if detail else what
        super().__init__(f"{text}; {remedy}" if remedy else text)
