"""Unit tests of the encode queue and its jobs."""
