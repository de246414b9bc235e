"""Run `streamformer` of any checkout with altered surroundings: `altered_worker.py ALTERATION VALUE worker ...`.

The file is run by its path, so that it alters the checkout in the working directory and imports nothing of this one.

host NAME      the machine has this host name
sequence N     idempotent producers begin with this sequence number
encoder USER   the encoder raises when a batch holds the user whose id begins with this text
env NAME=VALUE the environment has another variable
slow MS        the encoder takes MS milliseconds longer per user
"""

from __future__ import annotations

import collections
import importlib
import os
import socket
import sys
import time
from typing import Any


def host(name: str) -> None:
    """Give the machine another host name."""
    socket.gethostname = lambda: name
    socket.getfqdn = lambda name=name: name


def env(assignment: str) -> None:
    """Set a variable of the environment."""
    name, _, value = assignment.partition("=")
    os.environ[name] = value


def sequence(first: str) -> None:
    """Begin the sequence numbers of idempotent producers at `first`; transactional ones are left alone."""
    manager: Any = importlib.import_module("aiokafka.producer.transaction_manager").TransactionManager
    original = manager.__init__

    def begin(self: Any, transactional_id: str | None, *args: Any, **kwargs: Any) -> None:
        original(self, transactional_id, *args, **kwargs)
        if transactional_id is None:
            self._sequence_numbers = collections.defaultdict(lambda: int(first))

    manager.__init__ = begin


def encoder(prefix: str) -> None:
    """Make the encoder raise for users whose id begins with `prefix`."""

    def check(batch: Any) -> None:
        if any(bytes(user).startswith(prefix.encode()) for user in batch.users):
            raise RuntimeError(f"the encoder cannot embed {prefix}")

    _wrap_runtime(check)


def slow(milliseconds: str) -> None:
    """Make the encoder slower."""
    _wrap_runtime(lambda batch: time.sleep(len(batch.users) * float(milliseconds) / 1_000))


def _wrap_runtime(before: Any) -> None:
    """Call `before(batch)` before each batch is embedded."""
    module: Any = importlib.import_module("encoder.inference")
    load = module.load_runtime

    class Wrapped:
        def __init__(self, runtime: Any) -> None:
            self._runtime = runtime

        def __getattr__(self, name: str) -> Any:
            return getattr(self._runtime, name)

        def embed(self, batch: Any) -> Any:
            before(batch)
            return self._runtime.embed(batch)

    module.load_runtime = lambda *args, **kwargs: Wrapped(load(*args, **kwargs))


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    {"host": host, "env": env, "sequence": sequence, "encoder": encoder, "slow": slow}[sys.argv.pop(1)](sys.argv.pop(1))
    importlib.import_module("infra.cli").main()
