"""A real Apache Kafka from pip alone."""
