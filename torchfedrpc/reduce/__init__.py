"""Sums and means of results, formed on the workers."""
