"""Sums and means of results, computed on the workers."""
