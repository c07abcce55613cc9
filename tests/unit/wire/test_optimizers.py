"""Optimisers in pickles: all of their attributes come back, and they go on with the same bits."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchfedrpc.errors import SerializationError
from torchfedrpc.host.state_comparison import first_difference
from torchfedrpc.wire.encodings import ScheduledStep, reduce_optimizer, scheduled_step


class Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ScheduledStep):
            return scheduled_step, (obj.optimizer,)
        return reduce_optimizer(obj) if isinstance(obj, Optimizer) else NotImplemented


class Counting(torch.optim.SGD):
    """Counts its steps beside what its base keeps."""

    num_steps = 0

    def step(self, closure: Any = None) -> Any:
        self.num_steps += 1
        return super().step(closure)


class OwnState(torch.optim.SGD):
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "note": "its own"}


def hook(*args: Any) -> None:
    """Does nothing."""


def rebuilt(parts: Any) -> Any:
    file = io.BytesIO()
    Pickler(file, 5).dump(parts)
    return pickle.loads(file.getvalue())


def parts_of(make: Callable[..., Optimizer]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return {"model": model, "optimiser": make(model.parameters())}


def step(parts: dict[str, Any]) -> Tensor:
    def closure() -> Tensor:
        parts["optimiser"].zero_grad()
        loss = parts["model"](torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    parts["optimiser"].step(closure)
    parts["optimiser"].zero_grad()
    weight: Tensor = parts["model"].weight
    return weight


def hooked(parameters: Any) -> Optimizer:
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    optimiser.register_step_post_hook(hook)
    return optimiser


@pytest.mark.parametrize("make", [torch.optim.LBFGS, Counting, hooked, torch.optim.Adam, torch.optim.SGD])
def test_optimiser_comes_back_with_all_attributes(make: Callable[..., Optimizer]) -> None:
    parts = parts_of(make)
    step(parts)
    others = rebuilt(parts)
    assert vars(others["optimiser"]).keys() == vars(parts["optimiser"]).keys()
    assert first_difference(parts, others) is None
    assert torch.equal(step(others), step(parts))


def test_scheduler_knows_that_a_rebuilt_optimiser_has_stepped() -> None:
    parts = parts_of(torch.optim.SGD)
    parts["scheduler"] = torch.optim.lr_scheduler.StepLR(parts["optimiser"], 1)
    others = rebuilt(parts)
    assert first_difference(parts, others) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a wrapper that is gone, and of a step that it has not seen
        step(others)
        others["scheduler"].step()
    assert others["optimiser"]._opt_called
    assert rebuilt(others)["optimiser"]._opt_called


def test_optimiser_class_that_says_what_its_state_is_is_left_to_it() -> None:
    assert reduce_optimizer(OwnState([torch.zeros(1)])) is NotImplemented


def test_step_of_something_else_is_not_wrapped() -> None:
    with pytest.raises(SerializationError, match="a Linear is no optimiser"):
        scheduled_step(nn.Linear(1, 1))
