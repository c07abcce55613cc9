"""Grad and inference mode of a call's own: torch keeps them by thread, and calls take turns on one."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

import torch


class AutogradMode:
    """Around each step of a call: gives it the modes that its last step left, and the thread its own back.

    A call begins with gradients enabled, whatever ran before it.
    """

    def __init__(self) -> None:
        self._grad, self._inference = True, False
        self._stack = ExitStack()

    def __enter__(self) -> None:
        # Inference mode first, since it sets grad mode too.
        self._stack.enter_context(torch.inference_mode(self._inference))
        self._stack.enter_context(torch.set_grad_enabled(self._grad))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._stack.close()
