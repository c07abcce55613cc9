"""The configuration of the bundled experiments: one folder for each hydra group."""
