"""Tests of features, models, data, training and evaluation."""
