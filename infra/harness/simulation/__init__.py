"""A deterministic simulation of one partition: the real core on an in-memory broker, beside an independent model."""
