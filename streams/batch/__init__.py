"""Batch computations with the code of the stream: iterators of sorted batches in, iterators of batches out."""
