"""Commands that `infra` adds to the console script, one per file."""
