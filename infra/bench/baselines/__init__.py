"""Other systems on the same job, each written as its own documentation would have it."""
