"""Tests of the chaos runs: the checker that judges them, and short runs of their own."""
