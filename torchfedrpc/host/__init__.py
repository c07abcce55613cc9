"""The process that owns learners: the same host serves the driver itself and every worker."""
