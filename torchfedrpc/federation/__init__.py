"""Trainers and learners: the federated algorithms, and what they are made of."""
