"""Encoder runtimes: batched full passes, and incremental passes over cached keys and values.

Torch is imported when `load_runtime` is first used: a worker that computes features only has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from encoder.inference.interface import EncoderRuntime

if TYPE_CHECKING:
    from encoder.inference.runtime import load_runtime

__all__ = ["EncoderRuntime", "load_runtime"]


def __getattr__(name: str) -> Any:
    if name == "load_runtime":
        from encoder.inference.runtime import load_runtime

        return load_runtime
    raise AttributeError(name)
