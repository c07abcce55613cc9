"""Datasets of the bundled experiments, and partitions among clients."""
