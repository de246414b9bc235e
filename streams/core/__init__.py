"""The pure, columnar core: sequences, triggers, partition state. No framework, I/O or clock: `now_ms` is passed in."""
