"""Scope of a call: context variables, torch modes and settings, and random streams while its code runs."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch

from torchfedrpc.host.mailbox import Job
from torchfedrpc.host.process_state import ProcessState
from torchfedrpc.host.randomness import StreamState
from torchfedrpc.host.torch_settings import Settings, glance, put_back, read_settings

T = TypeVar("T")

# Modes of a thread: gradients enabled, inference mode, number of open function modes (such as torch.device), number
# of open autocast blocks, autocast for the CPU and for CUDA, and their dtypes.
_Modes = tuple[bool, bool, int, int, bool, bool, torch.dtype, torch.dtype]

_BEGIN: _Modes = (True, False, 0, 0, False, False, torch.bfloat16, torch.float16)

_torch_c: Any = torch._C


class CallScope:
    """Context manager around each step of a call. Restores the state of the last step, and that of the process after.

    A call begins with gradients enabled, without inference mode, autocast and function modes, with the settings as
    of the opening of the proxy, and with random streams that depend on its seed alone. Blocks that are open at the
    end of a step (``with torch.device(...)``) are set aside until the next step. Tasks and callbacks that an async
    method starts have the scope of its call, also if they outlive the call.

    The threads of a host have the modes of a new thread between steps, so only a nested scope reads them first. After
    a step of a method, only the settings that `glance` reads are compared, since reading all of them takes 20
    microseconds. Calls that run concurrently share the settings and random streams of the process.

    Args:
        process: The state that the calls of this process share.
        job: The job whose code runs.
        method: Name of its method.
        seed: Seed of the streams, from `call_seed`.
        is_thorough: Whether to compare all settings after a step, as after a constructor.
        is_nested: Whether the scope is entered within a step of another call, which uses the generators.

    Attributes:
        call: The call that `current_call` returns, made when it is first asked for.
        is_nested: Whether the scope is entered within a step of another call.
        is_resumable: Whether another step follows, which continues the random streams of this one.
    """

    __slots__ = (
        "_functions",
        "_guard",
        "_is_thorough",
        "_modes",
        "_opened",
        "_outer_modes",
        "_outer_settings",
        "_outer_streams",
        "_own_settings",
        "_own_streams",
        "_streams",
        "_twister",
        "call",
        "is_nested",
        "is_resumable",
        "job",
        "method",
        "process",
        "seed",
    )

    def __init__(
        self,
        process: ProcessState,
        job: Job,
        method: str,
        seed: int,
        *,
        is_thorough: bool = False,
        is_nested: bool = False,
    ) -> None:
        self.process = process
        self.job = job
        self.method = method
        self.seed = seed
        self.call: Any = None
        self.is_resumable = False
        self._opened = process.settings if process.is_alone or is_nested else None
        self._streams = process.streams if process.is_alone or is_nested else None
        self._is_thorough = is_thorough
        self.is_nested = is_nested
        self._modes = self._outer_modes = _BEGIN
        self._functions: list[Any] = []  # function modes of blocks that are open between steps, the innermost first
        self._own_settings: Settings | None = None
        self._outer_settings: Settings | None = None
        self._own_streams: StreamState | None = None
        self._outer_streams: StreamState | None = None

    def new_context(self) -> contextvars.Context:
        """Return a context for code of this scope, without variables of other calls."""
        context = contextvars.Context()
        context.run(scope_here.set, self)
        return context

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Run a step of the call."""
        with self:
            return function(*args)

    def __enter__(self) -> None:
        if self.is_nested:
            self._outer_modes = _read_modes()
        own = self._modes
        self._guard = _torch_c._InferenceMode(own[1])  # sets grad mode too; leaving it restores both
        self._guard.__enter__()
        try:
            if (gpu := self.job.mailbox.device) is not None:
                torch.cuda.set_device(gpu)  # of this thread, on which a learner of another GPU may have run
            if own is not self._outer_modes:
                _torch_c._set_grad_enabled(own[0])
                if own[3:] != self._outer_modes[3:]:
                    _set_autocast(self._outer_modes, own)
                while self._functions:
                    _torch_c._push_on_torch_function_stack(self._functions.pop())
            opened, streams = self._opened, self._streams
            if opened is not None and (self._own_settings is not None or glance() != opened.glance):
                self._outer_settings = read_settings()
                put_back(self._own_settings or opened.values)
            if streams is not None:
                if self.is_nested:
                    self._outer_streams = streams.capture()
                elif streams.aside is None:
                    streams.aside = streams.capture()
                if self._own_streams is None:
                    self._twister = streams.seed(self.seed)
                else:
                    streams.restore(self._own_streams)
        except BaseException:
            self._leave()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (streams := self._streams) is not None:
            if self.is_resumable:
                self._own_streams = streams.capture()
            else:
                streams.spare.append(self._twister)
            if self._outer_streams is not None:
                streams.restore(self._outer_streams)
        self._leave()

    def _leave(self) -> None:
        """Keep the settings and modes of the call for its next step, and restore those of process and thread."""
        try:
            if (opened := self._opened) is not None:
                outer, self._outer_settings = self._outer_settings, None
                is_changed = glance() != opened.glance or (self._is_thorough and read_settings() != opened.values)
                self._own_settings = read_settings() if is_changed else None
                if is_changed or outer is not None:
                    put_back(outer or opened.values)
        finally:
            self._modes = own = _read_modes()
            before = self._outer_modes
            for _ in range(own[2] - before[2]):
                self._functions.append(_torch_c._pop_torch_function_stack())
            self._guard.__exit__(None, None, None)
            del self._guard
            if own[3:] != before[3:]:
                _set_autocast(own, before)


def _read_modes() -> _Modes:
    torch.autocast_increment_nesting()
    return (
        _is_grad_enabled(),
        _is_inference(),
        _num_functions(),
        torch.autocast_decrement_nesting(),
        _is_autocast("cpu"),
        _is_autocast("cuda"),
        _autocast_dtype("cpu"),
        _autocast_dtype("cuda"),
    )


_is_grad_enabled, _is_inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
_num_functions = _torch_c._len_torch_function_stack
_is_autocast, _autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype


def _set_autocast(present: _Modes, wanted: _Modes) -> None:
    for device, enabled, dtype in (("cpu", wanted[4], wanted[6]), ("cuda", wanted[5], wanted[7])):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
    for _ in range(wanted[3] - present[3]):
        torch.autocast_increment_nesting()
    for _ in range(present[3] - wanted[3]):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()  # with casts of weights that may have changed since


scope_here: contextvars.ContextVar[CallScope | None] = contextvars.ContextVar("torchfedrpc_scope")
"""The scope of the running code; None in code of the host, unset in contexts that users have made."""


def client_here() -> str | None:
    """Return the client whose method, or constructor, this code belongs to; None in other code."""
    scope = scope_here.get(None)
    return scope.job.call.client_id if scope is not None else None


def outside() -> contextvars.Context:
    """Return a context for code of the host."""
    context = contextvars.Context()
    context.run(scope_here.set, None)
    return context
