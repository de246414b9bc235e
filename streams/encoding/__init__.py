"""From due users to published embeddings: the encode queue, and the jobs of each partition."""
