"""Unit tests of codec, stores and checkpoints."""
