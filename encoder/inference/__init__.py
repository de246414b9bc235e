"""Encoder runtimes: batched full passes, and incremental passes over cached keys and values."""
