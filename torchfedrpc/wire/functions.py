"""Functions of torch that may travel as values, such as the activation that a layer was given.

They compute on tensors, and no more. A pickle can hand them on, to an attribute say, and never call them: see
`rebuild`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from torchfedrpc.errors import UntrustedTypeError

_OF_TORCH = "abs celu cos erf exp expm1 log log1p relu rrelu selu sigmoid sin softmax sqrt square tanh threshold"
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
