"""Datasets of the bundled experiments, and the ways to divide one among clients."""
