"""Run the real worker with a faulty encoder: `python -m infra.harness.faulty_worker FAULT worker --config FILE`.

Only the runtime that the worker loads is wrapped: `nan` makes every embedding NaN, `slow` makes the encoder take ten
times as long, `raises` makes it raise on every batch with the user `bad`, `held` makes every call take a quarter of a
second.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32
from encoder.inference import EncoderRuntime
from infra import cli

SLOWER = 10
HELD_S = 0.25


class FaultyRuntime:
    """An `EncoderRuntime` with a fault."""

    def __init__(self, runtime: EncoderRuntime, fault: str) -> None:
        self._runtime, self._fault = runtime, fault

    def __getattr__(self, name: str) -> Any:
        """Delegate every other attribute to the real runtime."""
        return getattr(self._runtime, name)

    def embed(self, batch: SequenceBatch) -> F32:
        """Return the embeddings, late or replaced by NaN."""
        if self._fault == "raises" and b"bad" in batch.users:
            raise RuntimeError("this user cannot be embedded")
        started = time.monotonic()
        embeddings = self._runtime.embed(batch)
        if self._fault == "nan":
            return np.full_like(embeddings, np.nan)
        if self._fault == "held":
            time.sleep(HELD_S)
        if self._fault != "slow":
            return embeddings
        time.sleep((SLOWER - 1) * (time.monotonic() - started))
        return embeddings

    def forget(self, users: Sequence[bytes]) -> None:
        """Drop users from the cache."""
        self._runtime.forget(users)

    def clear(self) -> None:
        """Drop all users from the cache."""
        self._runtime.clear()


def main() -> None:
    """Take the fault from the command line and run the rest of it as `streamformer` does."""
    fault = sys.argv.pop(1)
    module: Any = importlib.import_module("encoder.inference")
    load = module.load_runtime

    def load_faulty(*args: Any, **kwargs: Any) -> FaultyRuntime:
        return FaultyRuntime(load(*args, **kwargs), fault)

    module.load_runtime = load_faulty
    cli.main()


if __name__ == "__main__":
    main()
