"""The encode queue, and the jobs that take a partition's due users to published embeddings."""
