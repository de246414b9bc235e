"""Settings: their groups, their sources and their checks."""
