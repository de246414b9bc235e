"""State that survives: codec, RocksDB store, changelog, checkpoint, restore."""
