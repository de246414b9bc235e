"""Actions as columns, and the rules by which an event becomes one: shared by training, batch and stream."""
