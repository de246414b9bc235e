"""Tests with real processes on a real broker."""
