"""Event logs, training, evaluation and their commands."""
