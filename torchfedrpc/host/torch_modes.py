"""What torch keeps by thread, grad mode and autocast among it, as a call's own: calls take turns on a thread."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

import torch

_AUTOCAST_DEVICES = ("cpu", "cuda")
_Autocast = tuple[int, list[tuple[bool, torch.dtype]]]  # open blocks; for each device whether enabled, and the dtype


class TorchModes:
    """Around each step of a call: gives it the modes that its last step left, and the thread its own back.

    A call begins with gradients enabled, out of inference mode and without autocast, whatever ran before it.
    """

    def __init__(self) -> None:
        self._grad, self._inference = True, False
        self._autocast: _Autocast | None = None
        self._outer_autocast = _autocast()
        self._stack = ExitStack()

    def __enter__(self) -> None:
        self._outer_autocast = _autocast()
        # Inference mode first: it sets grad mode too, and its end undoes what is enabled within it.
        self._stack.enter_context(torch.inference_mode(self._inference))
        self._stack.enter_context(torch.set_grad_enabled(self._grad))
        _set_autocast(self._autocast or (0, [(False, dtype) for _, dtype in self._outer_autocast[1]]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._autocast = _autocast()
        self._stack.close()
        _set_autocast(self._outer_autocast)


def _autocast() -> _Autocast:
    modes = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _AUTOCAST_DEVICES]
    return _num_open_blocks(), modes


def _set_autocast(state: _Autocast) -> None:
    num_open_blocks, modes = state
    for device, (enabled, dtype) in zip(_AUTOCAST_DEVICES, modes, strict=True):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
    while _num_open_blocks() < num_open_blocks:
        torch.autocast_increment_nesting()
    while _num_open_blocks() > num_open_blocks:
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()  # of weights that another call has cast, and may have changed since


def _num_open_blocks() -> int:
    """Open ``torch.autocast`` blocks of this thread; at the end of the outermost, torch drops what it has cast."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()
