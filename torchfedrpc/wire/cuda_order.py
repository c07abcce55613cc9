"""Order between threads that use CUDA tensors on different streams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Fence:
    """Events on the CUDA streams of the thread that makes it, behind the work on some tensors.

    Args:
        tensors: Tensors on GPUs.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        devices = dict.fromkeys(tensor.device for tensor in tensors)
        self._events = {device: torch.cuda.current_stream(device).record_event() for device in devices}

    def wait(self) -> None:
        """Let the calling thread's streams wait for the events.

        The tensors' memory is not reused before those streams are done with it.
        """
        for device, event in self._events.items():
            torch.cuda.current_stream(device).wait_event(event)
        for tensor in self._tensors:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def fence(tensors: Sequence[Tensor]) -> Fence | None:
    """Return a fence behind this thread's work on these tensors; None if no tensor is on a GPU."""
    on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
    return Fence(on_gpu) if on_gpu else None
