"""Unit tests of wire formats."""
