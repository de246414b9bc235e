"""Unit tests of commands, data sets, deployment files and processes."""
