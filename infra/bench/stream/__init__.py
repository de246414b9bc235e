"""Benchmarks of the stream: ingestion, freshness, restore."""
