"""Federated algorithms: trainers, learners, aggregation and checkpoints."""
