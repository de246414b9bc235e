"""Benchmarks of the encoder runtime."""
