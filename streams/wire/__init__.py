"""Bytes to columns and back: actions in, embeddings and dead letters out."""
