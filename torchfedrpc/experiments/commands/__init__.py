"""Subcommands of `torchfedrpc`."""
