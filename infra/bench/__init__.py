"""Benchmarks, one a file; each prints a table and ends with one JSON line."""
