"""Tests of the core by simulation."""
