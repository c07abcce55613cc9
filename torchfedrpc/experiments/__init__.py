"""The bundled application: federated learning experiments from the command line."""
