"""What surrounds the product: a local broker, topics, replay, demo, dashboards, benchmarks."""
