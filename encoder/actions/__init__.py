"""Actions as columns: one layout shared by training, batch and stream."""
