"""The engine: Faust extended to deliver record batches and to own partitions; only here are its insides used."""
