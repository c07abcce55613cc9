"""How torch's optimisers are pickled: with all of their attributes, of which torch's own ``__getstate__`` has three.

The others are what a subclass keeps (LBFGS its list of parameters), hooks, and a scheduler's wrapper of ``step()``.
"""

from __future__ import annotations

import copyreg
import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from torchfedrpc.errors import SerializationError

_MARK = "_wrapped_by_lr_sched"  # of torch's wrapper, see LRScheduler.__init__


def reduce_optimizer(optimizer: Optimizer) -> Any:
    """What a pickler's ``reducer_override`` gives for an optimiser.

    Returns:
        As ``__reduce_ex__``; NotImplemented where a class between decides about its state by itself.
    """
    cls = type(optimizer)
    own: Any = cls.__reduce_ex__, cls.__reduce__, cls.__getstate__
    if own != (object.__reduce_ex__, object.__reduce__, Optimizer.__getstate__):
        return NotImplemented
    state = dict(vars(optimizer))
    if is_scheduled(state.get("step")):
        state["step"] = ScheduledStep(optimizer)
    new: Any = copyreg
    return new.__newobj__, (cls,), state


def is_scheduled(step: Any) -> bool:
    """Whether it is an optimiser's ``step()`` in the wrapper of a scheduler."""
    return hasattr(step, _MARK)


def scheduled_step(optimizer: Any) -> Callable[..., Any]:
    """A ``step()`` that notes on its optimiser that it was called, as a scheduler wants it.

    Raises:
        SerializationError: this is no optimiser.
    """
    if not isinstance(optimizer, Optimizer):
        raise SerializationError(f"a {type(optimizer).__qualname__} is no optimiser, whose step() could be wrapped")
    reference = weakref.ref(optimizer)  # it is an attribute of the optimiser

    @functools.wraps(type(optimizer).step)
    def step(*args: Any, **kwargs: Any) -> Any:
        owner: Any = reference()
        owner._opt_called = True
        return type(owner).step(owner, *args, **kwargs)

    setattr(step, _MARK, True)
    return step


class ScheduledStep:
    """Stands for the wrapper in the state of an optimiser, where the pickler meets it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
