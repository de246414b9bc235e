"""Ranking metrics and the evaluations of a release on a log."""
