"""Fault injection, and checks of learners' state, for users' tests."""

from torchfedrpc.testing.faults import Faults
from torchfedrpc.testing.modes import check_learner
from torchfedrpc.testing.snapshots import check_snapshot
from torchfedrpc.testing.stateless import check_stateless

__all__ = ["Faults", "check_learner", "check_snapshot", "check_stateless"]
