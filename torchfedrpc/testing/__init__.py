"""Fault injection and snapshot checks for users' tests."""

from torchfedrpc.testing.faults import Faults
from torchfedrpc.testing.snapshots import check_snapshot

__all__ = ["Faults", "check_snapshot"]
