"""Sweeps of runs, and what several runs have in common."""
