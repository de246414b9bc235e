"""Checks of a run: its topics, compared with what the input topic demands."""
