"""Simulated GPUs: tensors in host memory that say which GPU they are on, for tests of the ways that tensors take.

A tensor's GPU is that of its storage. A copy to a device, and a new tensor on a device, have a storage there. Sums of
tensors on several devices raise an error, as on GPUs. Operations that are not named here give tensors on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

_base: Any = torch._C.TensorBase
_CPU = torch.device("cpu")


class SimulatedGpus:
    """GPUs of this process, from `install` to the end of a test.

    Args:
        count: Number of GPUs.
        current: Number of the current GPU of each thread, before the thread sets another.
    """

    def __init__(self, count: int, current: int = 0) -> None:
        self.devices = [torch.device("cuda", index) for index in range(count)]
        self.generators = [torch.Generator().manual_seed(index) for index in range(count)]
        self._default = current
        self._current = threading.local()
        self._storages: dict[int, tuple[torch.device, Any]] = {}  # with the storage, so that its address stays unique

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Declare that a tensor's storage is on a device."""
        if device.type == "cuda":
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = self._numbered(device), storage
        return tensor

    def device_of(self, tensor: Tensor) -> torch.device:
        if tensor.layout is not torch.strided:
            return _CPU
        return self._storages.get(tensor.untyped_storage()._cdata, (_CPU, None))[0]

    def _numbered(self, device: torch.device) -> torch.device:
        index: int | None = device.index
        return device if device.type != "cuda" else self.devices[self.current() if index is None else index]

    def current(self) -> int:
        return getattr(self._current, "index", self._default)

    def set_current(self, device: Any) -> None:
        self._current.index = torch.device("cuda", device).index if isinstance(device, int) else device.index

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace functions of torch."""
        cuda, device_of = torch.cuda, self.device_of
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda, "device_count", lambda: len(self.devices))
        monkeypatch.setattr(cuda, "init", lambda: None)
        monkeypatch.setattr(cuda, "current_device", self.current)
        monkeypatch.setattr(cuda, "set_device", self.set_current)
        monkeypatch.setattr(cuda, "current_stream", lambda device=None: _Stream())
        monkeypatch.setattr(cuda, "default_generators", tuple(self.generators))
        monkeypatch.setattr(Tensor, "device", property(device_of), raising=False)
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: device_of(tensor).type == "cuda"))
        monkeypatch.setattr(Tensor, "is_cpu", property(lambda tensor: device_of(tensor).type == "cpu"))
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
        monkeypatch.setattr(Tensor, "to", lambda tensor, *args, **kwargs: self._to(tensor, *args, **kwargs))
        monkeypatch.setattr(Tensor, "cpu", lambda tensor: self._to(tensor, _CPU))
        monkeypatch.setattr(Tensor, "cuda", lambda tensor: self._to(tensor, torch.device("cuda")))
        for name in ("clone", "__deepcopy__", "add_", "mul_", "div_"):
            monkeypatch.setattr(Tensor, name, self._on_one_device(getattr(Tensor, name)))
        monkeypatch.setattr(torch, "mul", self._on_one_device(torch.mul))
        for name in ("empty", "zeros", "full", "rand"):
            monkeypatch.setattr(torch, name, self._made(getattr(torch, name)))

    def _to(self, tensor: Tensor, *args: Any, device: Any = None, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], str | torch.device):
            device, args = args[0], args[1:]
        before = self.device_of(tensor)
        target = before if device is None else self._numbered(torch.device(device))
        moved: Tensor = _base.to(tensor, *args, copy=copy or target != before, **kwargs)
        return moved if moved is tensor else self.put(moved, target)

    def _on_one_device(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def operation(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            device = self.device_of(tensor)
            for other in (*args, *kwargs.values()):
                if isinstance(other, Tensor) and other.dim() and self.device_of(other) != device:
                    raise RuntimeError(f"expected all tensors on {device}, and one is on {self.device_of(other)}")
            return self.put(function(tensor, *args, **kwargs), device)

        return operation

    def _made(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            target = _CPU if device is None else torch.device(device)
            if target.type != "cuda":
                return function(*args, device=device, **kwargs)
            if function.__name__ == "rand":
                kwargs["generator"] = self.generators[self._numbered(target).index]
            return self.put(function(*args, **kwargs), target)

        return make


class _Stream:
    """A CUDA stream with nothing on it."""

    def record_event(self) -> None:
        return None

    def wait_event(self, event: None) -> None:
        return None
