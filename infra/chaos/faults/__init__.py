"""Faults of a run, by name."""
