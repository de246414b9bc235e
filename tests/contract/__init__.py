"""Tests of what the project relies on in libraries, RocksDB and Kafka."""
