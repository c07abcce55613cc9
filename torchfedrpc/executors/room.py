"""How many learners' states may be on their way at once, so that they are never all in memory."""

from __future__ import annotations

BUDGET_BYTES = 32 << 20
"""What the states on their way may have, unless a single one is larger."""

_FIRST_GUESS_BYTES = 8 << 20
_MAX_AT_ONCE = 64


class Room:
    """Room for a few states: as many as fit a budget if they are as large as the largest so far, at least one."""

    def __init__(self) -> None:
        self._largest_bytes = 0

    def saw(self, num_bytes: int) -> None:
        """Note the size of a state."""
        self._largest_bytes = max(self._largest_bytes, num_bytes)

    def fits(self, num_taken: int) -> bool:
        """Whether there is room for another beside so many."""
        expected_bytes = (num_taken + 1) * (self._largest_bytes or _FIRST_GUESS_BYTES)
        return not num_taken or (num_taken < _MAX_AT_ONCE and expected_bytes <= BUDGET_BYTES)
