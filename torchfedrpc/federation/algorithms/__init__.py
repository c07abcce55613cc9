"""Federated algorithms, one in each file: its equation, its paper, and where its defaults come from."""
