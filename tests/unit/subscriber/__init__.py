"""Tests of the subscribers, without a broker."""
