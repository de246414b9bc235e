"""Stream processing: record batches in, exact sequences, triggers, fresh embeddings out."""
