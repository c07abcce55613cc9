"""Help for the tests of those who use this library."""

from torchfedrpc.testing.faults import Faults
from torchfedrpc.testing.snapshots import check_snapshot

__all__ = ["Faults", "check_snapshot"]
