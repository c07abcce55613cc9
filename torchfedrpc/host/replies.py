"""When a host hands outcomes over: at once, or a moment later with others, where many calls wait for its threads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torchfedrpc.host.call import Outcome
from torchfedrpc.host.deadlines import Deadlines
from torchfedrpc.host.mailbox import Reply

logger = logging.getLogger(__name__)

_ENOUGH_S = 0.01  # for which outcomes are held, where the calls between take less
_MOST_S = 0.02  # the same where one takes longer
_PATIENCE = 5  # times as long for outcomes of calls whose results stay here: what these come to is waited for


class Replies:
    """Outcomes on their way to those who wait for them.

    Whoever is woken takes time from the methods: an event loop's thread has the interpreter for a while, or a message
    is sent. So while calls wait for their turn, outcomes of short ones are held until as many are held as calls wait,
    and some milliseconds at most. Thread-safe.

    Args:
        num_waiting: how many calls wait for a thread of the host.
        together: a context in which replies are made that belong together.
        deadlines: gives back held replies, by `late`, after a time.

    Attributes:
        are_held: False where each reply is to be made at once.
    """

    def __init__(
        self,
        num_waiting: Callable[[], int],
        together: Callable[[], AbstractContextManager[None]],
        deadlines: Deadlines,
    ) -> None:
        self.are_held = True
        self._num_waiting = num_waiting
        self._together = together
        self._deadlines = deadlines
        self._lock = threading.Lock()  # guards what follows
        self._held: list[tuple[Reply, Outcome]] = []
        self._since = 0.0  # when the first of these came
        self._patience = 0  # of those for whom the clock runs, in these times; 0: it does not run
        self._num_gathering = 0

    def put(self, reply: Reply | None, outcome: Outcome, *, can_wait: bool = False) -> None:
        """Make a reply, soon.

        Args:
            reply: takes the outcome; None where nobody waits for it.
            outcome: of a call, or a step of a stream.
            can_wait: whether it is of a call whose result stays here, so that it need not come early.
        """
        due: list[tuple[Reply, Outcome]] = []
        with self._lock:
            if reply is not None:
                if not self._held:
                    self._since = time.monotonic()
                self._held.append((reply, outcome))
            if not self._held:
                return
            patience = _PATIENCE if can_wait else 1
            if self._is_due(outcome, patience):
                due, self._held = self._held, []
            starts_timer = not due and not self._num_gathering and not 0 < self._patience <= patience
            if starts_timer:
                self._patience = patience
        if starts_timer:
            self._deadlines.start(self, patience * _MOST_S)
        self._reply(due)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it replies are held, to be made together."""
        with self._lock:
            self._num_gathering += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_gathering -= 1
            self.late()

    def late(self) -> None:
        """Time is up: make the replies that are held."""
        with self._lock:
            held, self._held = self._held, []
            self._patience = 0
        self._reply(held)

    def _is_due(self, outcome: Outcome, patience: int) -> bool:
        if self._num_gathering:
            return False
        num_waiting = self._num_waiting()
        return (
            not num_waiting
            or not self.are_held
            or outcome.seconds >= patience * _ENOUGH_S
            or time.monotonic() - self._since >= patience * _ENOUGH_S
            or (len(self._held) > num_waiting and patience == 1)
        )

    def _reply(self, held: list[tuple[Reply, Outcome]]) -> None:
        if not held:
            return
        with self._together() if len(held) > 1 else nullcontext():
            for reply, outcome in held:
                try:
                    reply(outcome)
                except Exception:  # the others must not suffer for it, nor this thread
                    logger.exception("an outcome could not be handed over")
