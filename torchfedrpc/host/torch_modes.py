"""What torch keeps by thread, as a call's own: grad mode, autocast, open ``torch.device`` blocks and other modes."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

# For the CPU and for CUDA whether autocast is on, and its dtype; how many blocks of it are open.
_Autocast = tuple[bool, torch.dtype, bool, torch.dtype, int]


class TorchModes:
    """Around each step of a call: gives it the modes that its last step left, and the thread its own back.

    A call begins with gradients enabled, out of inference mode and without autocast, whatever ran before it. Blocks
    that it has open as its step ends (``with torch.device(...)``, and other function modes of torch) are set aside.
    """

    __slots__ = (
        "_autocast",
        "_functions",
        "_grad",
        "_guard",
        "_inference",
        "_num_outer_functions",
        "_outer_autocast",
        "_outer_grad",
    )

    def __init__(self) -> None:
        self._grad, self._inference = True, False
        self._autocast: _Autocast | None = None
        self._outer_autocast: _Autocast
        self._outer_grad: bool
        self._functions: list[Any] = []  # the innermost first
        self._num_outer_functions = 0
        self._guard: Any = None

    def __enter__(self) -> None:
        self._outer_autocast = outer = _autocast()
        self._outer_grad = torch.is_grad_enabled()
        # Inference mode first: it sets grad mode too, and its end undoes what is enabled within it.
        self._guard = torch._C._InferenceMode(self._inference)
        self._guard.__enter__()
        torch._C._set_grad_enabled(self._grad)
        _set_autocast(outer, self._autocast or (False, outer[1], False, outer[3], 0))
        self._num_outer_functions = _num_functions()
        while self._functions:
            _push_function(self._functions.pop())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while _num_functions() > self._num_outer_functions:
            self._functions.append(_pop_function())
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._autocast = _autocast()
        guard, self._guard = self._guard, None
        guard.__exit__(kind, error, trace)
        torch._C._set_grad_enabled(self._outer_grad)
        _set_autocast(self._autocast, self._outer_autocast)


_torch_c: Any = torch._C
_num_functions, _push_function = _torch_c._len_torch_function_stack, _torch_c._push_on_torch_function_stack
_pop_function = _torch_c._pop_torch_function_stack


def _autocast() -> _Autocast:
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        _num_open_blocks(),
    )


def _set_autocast(present: _Autocast, wanted: _Autocast) -> None:
    if present != wanted:
        for device, (enabled, dtype) in {"cpu": wanted[:2], "cuda": wanted[2:4]}.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        while _num_open_blocks() < wanted[4]:
            torch.autocast_increment_nesting()
        while _num_open_blocks() > wanted[4]:
            torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()  # of weights that another call has cast, and may have changed since


def _num_open_blocks() -> int:
    """Open ``torch.autocast`` blocks of this thread; at the end of the outermost, torch drops what it has cast."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()
