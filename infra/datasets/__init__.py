"""Data sets, the generator of synthetic logs, and their replay to Kafka."""
