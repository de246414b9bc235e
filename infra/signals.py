"""Signals of commands and of the processes that they start.

A shell starts a background job with SIGINT ignored, `nohup` adds SIGHUP, and every child inherits both. For
`nohup streamformer demo &` this means:

- The command itself leaves ignored signals ignored, as the shell intends: neither Ctrl-C nor a closed terminal ends it.
- SIGTERM always ends it in order, exactly as Ctrl-C ends a command in the foreground.
- Its children run in sessions of their own, which no terminal reaches. They start with default dispositions, so they
  obey the signals that the command sends them.
"""

from __future__ import annotations

import signal

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt_on_sigterm() -> None:
    """Make SIGTERM raise `KeyboardInterrupt` in the main thread."""
    signal.signal(signal.SIGTERM, _interrupt)


def restore_default_signals() -> None:
    """Reset what a parent may have ignored; for the child between fork and exec."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # raising SIGINT would do nothing
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)  # so that asyncio's own handler cancels its tasks first
