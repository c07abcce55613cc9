"""Order between threads that use CUDA tensors on different streams."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def fence(tensors: list[Tensor]) -> Callable[[], None] | None:
    """Record an event on this thread's CUDA streams, behind the work on these tensors.

    Returns:
        A function that makes the calling thread's streams wait for the event, and keeps the tensors' memory from
        being reused before those streams are done with it; None if no tensor is on a GPU.
    """
    on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
    if not on_gpu:
        return None
    events = {}
    for device in dict.fromkeys(tensor.device for tensor in on_gpu):
        events[device] = torch.cuda.current_stream(device).record_event()

    def wait() -> None:
        for device, event in events.items():
            torch.cuda.current_stream(device).wait_event(event)
        for tensor in on_gpu:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))

    return wait
