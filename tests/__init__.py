"""Tests of streams, encoder and infra; README.md explains how to read and run them."""
