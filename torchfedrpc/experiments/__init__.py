"""Bundled application: federated learning experiments from the command line."""
