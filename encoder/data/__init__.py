"""Action logs: reading, splitting and batching."""
