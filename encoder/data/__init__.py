"""Event logs: read, split and cut into batches."""
