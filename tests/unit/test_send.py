"""`streamformer send` says what it does while it takes long, and what is missing."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from streams import send


class Producer:
    """A fake producer that acknowledges at once."""

    acknowledged = 0

    def send_json(self, line: bytes) -> None:
        """Count the line."""
        self.acknowledged += 1

    def flush(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize(("quiet", "lines"), [(False, ["1 sent", "2 sent", "3 sent"]), (True, [])])
def test_long_input_reports_progress(
    quiet: bool, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress goes to standard error, and not beside JSON."""
    monkeypatch.setattr(send, "PROGRESS_EVERY_S", 0)
    producer: Any = Producer()
    send._send_each([b"{}", b"{}", b"{}"], producer, quiet=quiet)
    output = capsys.readouterr()
    assert (output.out, output.err.splitlines()) == ("", lines)


@pytest.mark.parametrize("arguments", [[], ["ann"]])
def test_what_is_missing_is_named(arguments: list[str]) -> None:
    """Without a user or an item the error names both ways to use the command."""
    result = CliRunner().invoke(send.app, arguments, input='{"user_id": "ann"}')
    assert result.exit_code == 2
    assert "read JSON lines" in result.output
