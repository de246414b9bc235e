"""Unit tests of metrics and logging."""
