"""Tests of what surrounds the core of the streaming features: files, offline computation, and the oracle in SQL."""
