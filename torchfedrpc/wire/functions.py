"""Functions of torch that may travel as values, such as the activation that a layer was given.

They compute on tensors, and no more. A pickle can hand them on, to an attribute say, and never call them: see
`rebuild`.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

import torch

from torchfedrpc.errors import UntrustedTypeError

_OF_TORCH = "abs celu cos erf exp expm1 log log1p relu rrelu selu sigmoid sin softmax sqrt square tanh threshold"
FACTORY = "torch.amp.grad_scaler._refresh_per_optimizer_state"
"""Makes a dict of constants for each optimiser of a ``GradScaler``, which has it as the factory of a defaultdict."""
_OF_SCHEDULERS = {
    "torch.optim.lr_scheduler.CyclicLR": "_triangular_scale_fn _triangular2_scale_fn _exp_range_scale_fn",
    "torch.optim.swa_utils.SWALR": "_linear_anneal _cosine_anneal",
}
_NUMBERS = (int, float, bool, type(None))
_OF_DATA = "default_collate default_convert"
_MODULES = ("torch.nn.functional", "torch._C._nn", "torch")


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {
        f"torch.nn.functional.{name}": function
        for name, function in vars(torch.nn.functional).items()
        if isinstance(function, types.FunctionType | types.BuiltinFunctionType)
        and not name.startswith("_")
        and getattr(function, "__module__", None) in _MODULES
    }
    found |= {f"torch.{name}": getattr(torch, name) for name in _OF_TORCH.split()}
    found |= {f"torch.utils.data.{name}": getattr(torch.utils.data, name) for name in _OF_DATA.split()}
    for path, names in _OF_SCHEDULERS.items():
        module, _, owner = path.rpartition(".")
        cls = getattr(importlib.import_module(module), owner)
        found |= {f"{path}.{name}": function for name in names.split() if (function := getattr(cls, name, None))}
    if factory := getattr(importlib.import_module("torch.amp.grad_scaler"), FACTORY.rpartition(".")[2], None):
        found[FACTORY] = factory
    return found


@functools.cache
def _names() -> dict[Callable[..., Any], str]:
    return {function: name for name, function in _functions().items()}


def name_of_function(function: Callable[..., Any]) -> str | None:
    """Return the name of a function that may travel; None where it may not."""
    return _names().get(function)


def function_named(name: Any) -> Callable[..., Any]:
    """Return the function of that name.

    Raises:
        UntrustedTypeError: If it may not travel.
    """
    if type(name) is not str or (found := _functions().get(name)) is None:
        raise UntrustedTypeError("a pickle names a function that may not travel: send plain data")
    return found


def take_apart(partial: functools.partial[Any]) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    """Return name, arguments and keywords of a function of the list with numbers filled in; None for any other."""
    values = [*partial.args, *partial.keywords.values()]
    name = name_of_function(partial.func) if isinstance(partial.func, types.FunctionType) else None
    if name is None or not all(type(value) in _NUMBERS for value in values):
        return None
    return name, partial.args, partial.keywords


def put_together(name: Any, args: Any, keywords: Any) -> functools.partial[Any]:
    """Return the function of that name with such arguments filled in.

    Raises:
        UntrustedTypeError: If it may not travel, or they are no numbers.
    """
    function = function_named(name)
    if type(args) is not tuple or type(keywords) is not dict:
        raise UntrustedTypeError("a pickle fills arguments into a function that are none")
    if not all(type(value) in _NUMBERS for value in (*args, *keywords.values())):
        raise UntrustedTypeError("a pickle fills arguments into a function that are no numbers")
    return functools.partial(function, *args, **keywords)
