"""Whose states are on their way to or from one worker, and who waits for that."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torchfedrpc.executors.journal import Record
from torchfedrpc.executors.room import Room

Follow = Callable[[Record], None]


class Turns:
    """Lets few learners at a time have their states on the way; nobody waits for another worker's.

    Args:
        label: the worker.
        room: says how many fit.
    """

    def __init__(self, label: str, room: Room) -> None:
        self._label = label
        self._room = room
        self._taken: set[Record] = set()
        self._line: OrderedDict[Record, Follow] = OrderedDict()

    def take(self, record: Record, follow: Follow) -> bool:
        """Whether a learner's state may be on its way now; where not, ``follow`` is called once it may."""
        if record not in self._taken and not self._has_room():
            self._line[record] = follow
            return False
        self._line.pop(record, None)
        self._taken.add(record)
        return True

    def go_on(self) -> None:
        """Let those who wait go on, as far as there is room."""
        while self._line and self._has_room():
            record, follow = self._line.popitem(last=False)
            follow(record)

    def _has_room(self) -> bool:
        if self._room.fits(len(self._taken)):
            return True
        self._taken = {one for one in self._taken if one.label == self._label and one.awaits_state}
        return self._room.fits(sum(one.carries_state for one in self._taken))
