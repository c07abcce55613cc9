"""Run a part of the test suite under torchrun: rank 0 runs pytest, the other ranks serve learners.

Usage: torchrun --standalone --nproc-per-node=3 tests/support/under_torchrun.py [pytest's arguments]
"""

from __future__ import annotations

import sys

import pytest

from torchfedrpc.run import drive

if __name__ == "__main__":
    sys.exit(drive(lambda: pytest.main(sys.argv[1:])))
