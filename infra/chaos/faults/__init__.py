"""The faults of a run, by name: what each does, and what may follow from it."""
