"""Which genes, in which role: sketch, statistics, partition."""
