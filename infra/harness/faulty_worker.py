"""A worker whose encoder misbehaves: `python -m infra.harness.faulty_worker nan|slow worker --config FILE`.

The worker is the real one; only the runtime that it loads is wrapped. `nan` answers NaN for every user, `slow` takes
ten times as long as the encoder itself.
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


class FaultyRuntime:
    """An `EncoderRuntime` that does as `fault` says."""

    def __init__(self, runtime: EncoderRuntime, fault: str) -> None:
        self._runtime, self._fault = runtime, fault

    def __getattr__(self, name: str) -> Any:
        """Everything else is the runtime's own."""
        return getattr(self._runtime, name)

    def embed(self, batch: SequenceBatch) -> F32:
        started = time.monotonic()
        embeddings = self._runtime.embed(batch)
        if self._fault == "nan":
            return np.full_like(embeddings, np.nan)
        time.sleep((SLOWER - 1) * (time.monotonic() - started))
        return embeddings

    def forget(self, users: Sequence[bytes]) -> None:
        self._runtime.forget(users)

    def clear(self) -> None:
        self._runtime.clear()


def main() -> None:
    fault = sys.argv.pop(1)
    module: Any = importlib.import_module("streams.app")
    load = module.load_runtime

    def load_faulty(*args: Any, **kwargs: Any) -> FaultyRuntime:
        return FaultyRuntime(load(*args, **kwargs), fault)

    module.load_runtime = load_faulty
    cli.main()


if __name__ == "__main__":
    main()
