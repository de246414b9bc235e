"""Tests of the encoder runtimes."""
