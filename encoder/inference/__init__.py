"""Encoder runtimes: batched full passes, and incremental passes over cached keys and values."""

from encoder.inference.runtime import EncoderRuntime, load_runtime

__all__ = ["EncoderRuntime", "load_runtime"]
