"""What the kinds of the corpus share: results as text that shows each bit, and small training problems."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_FEW = 4  # elements that are shown one by one


def bits(*values: Any) -> str:
    """Text that is equal for equal bits: of tensors, arrays, numbers and containers of them, in their order."""
    return " ".join(_text(value) for value in values)


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return _tensor_text(value.detach())
    if isinstance(value, np.ndarray):
        return _array_text(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_text(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    return repr(value)


def _tensor_text(tensor: Tensor) -> str:
    with torch.no_grad():
        plain = tensor.as_subclass(Tensor).resolve_conj().resolve_neg()
        name = str(plain.dtype).removeprefix("torch.")
        if plain.numel() <= _FEW and plain.dtype in (torch.float32, torch.float64, torch.int64, torch.bool):
            return f"{name}{plain.tolist()}"
        content = plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        return f"{name}{list(plain.shape)}#{hashlib.sha1(content).hexdigest()[:10]}"


def _array_text(array: np.ndarray[Any, Any]) -> str:
    if array.dtype.hasobject or array.size <= _FEW:
        return f"{array.dtype}{array.tolist()}"
    return f"{array.dtype}{list(array.shape)}#{hashlib.sha1(array.tobytes()).hexdigest()[:10]}"


def weights(model: nn.Module) -> str:
    """A model's parameters and buffers."""
    return bits(*model.state_dict().values())


def problem(rows: int = 16, features: int = 4) -> tuple[Tensor, Tensor]:
    """A regression problem from the random stream: x of shape (rows, features), y of shape (rows, 1)."""
    x = torch.randn(rows, features)
    return x, x.sum(1, keepdim=True) + 0.1 * torch.randn(rows, 1)


class Trained:
    """A linear model with its data; ``optimiser`` is made by ``make_optimiser``."""

    def __init__(self, client_id: str) -> None:
        self.x, self.y = problem()
        self.model = self.make_model()
        self.optimiser = self.make_optimiser()

    def make_model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def make_optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    def loss(self) -> Tensor:
        return nn.functional.mse_loss(self.model(self.x), self.y)

    def train(self) -> float:
        """One step of the optimiser; the loss before it."""
        self.optimiser.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimiser.step()
        return loss.item()

    def step(self) -> str:
        return bits(self.train(), *self.model.parameters())
