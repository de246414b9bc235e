"""The checker: what the topics of a run hold against what the input topic demands."""
