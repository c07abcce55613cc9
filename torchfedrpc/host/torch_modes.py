"""What torch keeps by thread, grad mode and autocast among it, as a call's own: calls take turns on a thread."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

import torch

_AUTOCAST_DEVICES = ("cpu", "cuda")
_Autocast = list[tuple[bool, torch.dtype]]


class TorchModes:
    """Around each step of a call: gives it the modes that its last step left, and the thread its own back.

    A call begins with gradients enabled, out of inference mode and without autocast, whatever ran before it.
    """

    def __init__(self) -> None:
        self._grad, self._inference = True, False
        self._autocast: _Autocast | None = None
        self._outer_autocast: _Autocast = []
        self._stack = ExitStack()

    def __enter__(self) -> None:
        self._outer_autocast = _autocast()
        # Inference mode first: it sets grad mode too, and its end undoes what is enabled within it.
        self._stack.enter_context(torch.inference_mode(self._inference))
        self._stack.enter_context(torch.set_grad_enabled(self._grad))
        _set_autocast(self._autocast or [(False, dtype) for _, dtype in self._outer_autocast])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._autocast = _autocast()
        self._stack.close()
        _set_autocast(self._outer_autocast)


def _autocast() -> _Autocast:
    return [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _AUTOCAST_DEVICES]


def _set_autocast(state: _Autocast) -> None:
    for device, (enabled, dtype) in zip(_AUTOCAST_DEVICES, state, strict=True):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
