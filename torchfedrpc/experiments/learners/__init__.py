"""Learners of the bundled trainers: local SGD, and what the algorithms with state at the clients add."""
