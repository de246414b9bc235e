"""Chaos test: real workers on a real broker under seeded faults, judged by a checker that shares no code with them."""
