"""Benchmarks of training speed, and evaluations for the quality tables."""
