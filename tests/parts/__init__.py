"""Tests with other products, each in the environment of `make test-parts`; nothing of it is needed by the product."""
