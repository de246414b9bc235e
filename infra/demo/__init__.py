"""The demo: the whole path on a real broker and real actions, and what freshness bought."""
