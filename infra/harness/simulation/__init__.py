"""A deterministic simulation of one partition: the real core over a broker of lists, with an independent model."""
