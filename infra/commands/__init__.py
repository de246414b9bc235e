"""The commands that `infra` adds to the console script, one a file."""
