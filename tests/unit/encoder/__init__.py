"""Unit tests of models, training and evaluation."""
