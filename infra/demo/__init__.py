"""The demo: the whole path on a real broker with real actions, and the value of freshness."""
