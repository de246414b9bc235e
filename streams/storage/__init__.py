"""Durable state: codec, stores, reader and checkpoint."""
