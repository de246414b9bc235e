"""Features computed from a log instead of the stream: point in time, for training sets and checks."""
