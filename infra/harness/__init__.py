"""One rig under the demo, the benchmarks, chaos and the integration tests."""
