"""Benchmarks of training, and the evaluations behind the quality tables."""
