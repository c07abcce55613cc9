"""Event loop of a host's async methods. Tasks and callbacks that a call starts run in the scope of the call."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import weakref
from asyncio import futures
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

from torchfedrpc.host.call_scope import CallScope, outside, scope_here

logger = logging.getLogger(__name__)

_UNKNOWN: Any = object()
_NO_USER_CODE = {getattr(futures, "_set_result_unless_cancelled", None)}  # such as the timer of asyncio.sleep


class HostLoop(asyncio.SelectorEventLoop):
    """Runs each callback that a call schedules in the scope of the call: steps of tasks, timers, readers.

    Steps of a task are callbacks of the loop too, in the task's context. So this holds for tasks of ``gather``,
    ``wait_for``, ``TaskGroup`` and for eager ones, at any depth of nesting. No sync method runs beside such a step.
    """

    _present: CallScope | None = None  # the scope of the running step

    def __init__(self) -> None:
        self._scope_of_generator: dict[int, tuple[CallScope, weakref.ref[Any]]] = {}
        super().__init__()

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """Schedule a callback for the next iteration of the loop."""
        callback, args = self._in_scope(callback, args, context, self._present)
        return super().call_soon(callback, *args, context=context)

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """Schedule a callback for the next iteration of the loop, from any thread."""
        callback, args = self._in_scope(callback, args, context, None)
        return super().call_soon_threadsafe(callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """Schedule a callback for a time of the loop's clock."""
        callback, args = self._in_scope(callback, args, context, self._present)
        return super().call_at(when, callback, *args, context=context)

    def stop(self) -> None:
        """Stop the loop.

        Raises:
            RuntimeError: If a call does so, since calls of other learners run in the loop too.
        """
        if scope_here.get(None) is not None:
            raise RuntimeError("a method cannot stop the event loop that it runs in: other calls run in it too")
        super().stop()

    # Transports of asyncio, and its public add_reader and add_writer, use these methods.

    def _add_reader(self, fd: Any, callback: Callable[..., object], *args: Any) -> Any:
        callback, args = self._in_scope(callback, args, None, self._present)
        return super()._add_reader(fd, callback, *args)  # type: ignore[misc]

    def _add_writer(self, fd: Any, callback: Callable[..., object], *args: Any) -> Any:
        callback, args = self._in_scope(callback, args, None, self._present)
        return super()._add_writer(fd, callback, *args)  # type: ignore[misc]

    def _in_scope(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
        present: CallScope | None,
    ) -> tuple[Callable[..., object], tuple[Any, ...]]:
        scope = scope_here.get(_UNKNOWN) if context is None else context.get(scope_here, _UNKNOWN)
        if scope is _UNKNOWN:  # a context that the user made: it belongs to the call that uses it first
            scope = present
            if scope is not None and context is not None:
                with contextlib.suppress(RuntimeError):  # the context is entered: only this callback is in the scope
                    context.run(scope_here.set, scope)
        if scope is None or any(callback is known for known in _NO_USER_CODE):
            return callback, args
        return self._step, (scope, callback, args)

    def _step(self, scope: CallScope, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        process, call_id = scope.process, scope.job.call.call_id
        clock = process.deadlines.stop(call_id)  # waiting for the lock does not count
        slot = None
        process.method_lock.enter(exclusive=True)
        self._present = scope
        try:
            if process.activity is not None:
                slot = process.activity.enter(call_id)
            if clock is not None:
                process.deadlines.start(call_id, *clock)
            scope.run(callback, *args)
        except (SystemExit, KeyboardInterrupt) as error:  # asyncio would end the loop, and all calls in it
            where = f"{scope.job.call.client_id}.{scope.method}"
            logger.error("a task or callback of %s raised %s", where, type(error).__name__, exc_info=error)
        finally:
            self._present = None
            if process.activity is not None:
                process.activity.leave(slot)
            try:
                if process.in_driver:
                    process.streams.give_back()
            finally:
                process.method_lock.leave(exclusive=True)

    # An async generator that is dropped before its end is closed in the scope of the call that began it, also if the
    # garbage collector finds it during another call.

    def _asyncgen_firstiter_hook(self, agen: AsyncGenerator[Any, Any]) -> None:
        super()._asyncgen_firstiter_hook(agen)  # type: ignore[misc]
        if (scope := scope_here.get(None)) is not None:
            key = id(agen)
            self._scope_of_generator[key] = scope, weakref.ref(agen, partial(self._generator_is_gone, key))

    def _generator_is_gone(self, key: int, reference: weakref.ref[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.call_soon_threadsafe(self._forget_generator, key, reference, context=outside())

    def _forget_generator(self, key: int, reference: weakref.ref[Any]) -> None:
        """Forget a generator after its finalizer, which needs its scope, unless another one has its id by now."""
        if self._scope_of_generator.get(key, (None, None))[1] is reference:
            del self._scope_of_generator[key]

    def _asyncgen_finalizer_hook(self, agen: AsyncGenerator[Any, Any]) -> None:
        scope, _ = self._scope_of_generator.pop(id(agen), (None, None))
        context = outside() if scope is None else scope.new_context()
        context.run(super()._asyncgen_finalizer_hook, agen)  # type: ignore[misc]
