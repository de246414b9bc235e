"""Tests of the streaming features."""
