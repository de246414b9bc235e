"""Evaluation of a release on a log: ranking metrics, next-item evaluation, and the value of freshness."""
