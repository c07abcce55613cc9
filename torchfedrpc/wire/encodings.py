"""Objects that pickle would write as calls of functions, taken apart into plain parts and put together by rule."""

from __future__ import annotations

import array
import builtins
import copyreg
import enum
import functools
import importlib
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from torchfedrpc.errors import SerializationError, UntrustedTypeError
from torchfedrpc.wire.tensors import PlainTensors


def take_apart(obj: Any) -> tuple[Any, ...] | None:
    """Return kind and parts of an object, for `put_together`; None for an object of any other type."""
    if isinstance(obj, BaseException):
        return "exception", type(obj), exception_args(obj), exception_state(obj)
    if isinstance(obj, enum.Enum):
        is_member = type(obj)._member_map_.get(obj.name) is obj  # else a combination of flags
        return "member", type(obj), obj.name if is_member else obj.value
    if isinstance(obj, torch.Generator):
        with PlainTensors():
            return "torch_generator", obj.device, obj.get_state()
    if isinstance(obj, torch.layout):
        return "layout", str(obj).removeprefix("torch.")
    if isinstance(obj, ScheduledStep):
        return "scheduled_step", obj.optimizer
    if type(obj) is array.array:
        return "array.array", obj.typecode, obj.tobytes()
    if isinstance(obj, types.FunctionType | types.BuiltinFunctionType) and (name := _names().get(obj)):
        return "function", name
    if type(obj) is functools.partial:
        return _partial_parts(obj)
    return None


def put_together(kind: str, parts: tuple[Any, ...]) -> Any:
    """Return the object that `take_apart` took apart; the parts may be forged.

    Raises:
        UntrustedTypeError: If they name a function that may not travel.
        SerializationError: If they make no object of that kind.
    """
    if (make := MAKERS.get(kind)) is None:
        raise SerializationError("a parcel has a part of a kind that there is not")
    return make(*parts)


# Exceptions travel as type, args and attributes, never through their own ``__reduce__``.

# Read-only values that are made of ``args``, and an AttributeError's object, which is often the learner.
_NOT_STATE = frozenset(("message", "exceptions", "obj"))


def exception_args(error: BaseException) -> tuple[Any, ...]:
    """Return the arguments that make the exception's builtin base."""
    if isinstance(error, BaseExceptionGroup):  # a subclass may have a constructor, and so args, that differ
        return error.message, list(error.exceptions)
    return error.args


def exception_state(error: BaseException) -> dict[str, Any]:
    """Return an exception's attributes beside its args: in its ``__dict__`` (notes too), in slots, and in C."""
    state = {}
    for cls in type(error).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            name = f"_{cls.__name__.lstrip('_')}{name}" if private else name
            if name not in ("__dict__", "__weakref__") and hasattr(error, name):
                state[name] = getattr(error, name)
    base: Any = _builtin_base(type(error))
    for name in _kept_in_c(base):
        if (value := getattr(error, name, None)) is not None:
            state[name] = value
    return state | error.__dict__


def rebuild_exception(cls: Any, args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    """Make an exception of that type with those args and attributes; no constructor of a user's runs.

    Raises:
        SerializationError: If ``cls`` is no exception type, or no exception has such a state.
    """
    if not (isinstance(cls, type) and issubclass(cls, BaseException)):
        raise SerializationError(f"a {type(cls).__qualname__} is not a type of exception")
    if type(args) is not tuple or type(state) is not dict:
        raise SerializationError(f"a {cls.__qualname__} came without its arguments and attributes")
    base: Any = _builtin_base(cls)
    error: BaseException = base.__new__(cls, *args)
    base.__init__(error, *args)  # some builtins ignore the arguments of __new__
    for name, value in state.items():
        if type(name) is not str or (name.startswith("__") and name != "__notes__"):
            shown = name if type(name) is str else f"a {type(name).__qualname__}"  # a sender's repr can be endless
            raise SerializationError(f"an exception came with {shown} among its attributes")
        if name == "__notes__" and not isinstance(value, list):
            continue  # anything that formats the exception would fail
        slot = inspect.getattr_static(cls, name, None)
        if isinstance(slot, types.GetSetDescriptorType) and name not in _kept_in_c(base):
            raise SerializationError(f"an exception came with {name} among its attributes")
        if isinstance(slot, types.MemberDescriptorType | types.GetSetDescriptorType):
            slot.__set__(error, value)
        else:  # past properties and a __setattr__ of the class, which could do anything
            error.__dict__[name] = value
    return error


@functools.cache
def _kept_in_c(base: type[BaseException]) -> tuple[str, ...]:
    """Return the attributes that a builtin exception keeps outside ``args`` and ``__dict__``."""
    return tuple(
        name
        for cls in base.__mro__
        for name, entry in vars(cls).items()
        if isinstance(entry, types.MemberDescriptorType | types.GetSetDescriptorType)
        and not name.startswith("_")
        and name not in _NOT_STATE
        and name != "args"
    )


def _builtin_base(cls: type[BaseException]) -> type[BaseException]:
    found: Any = next(base for base in cls.__mro__ if vars(builtins).get(base.__name__) is base)
    nearest: type[BaseException] = found
    return nearest


# Functions of torch, such as the activation that a layer was given, travel by name. They compute on tensors and
# numbers, and a pickle cannot call them: it can only pass them on, for example to an attribute.

FACTORY = "torch.amp.grad_scaler._refresh_per_optimizer_state"
"""Makes a dict of constants for each optimiser of a ``GradScaler``, as the factory of a defaultdict."""
_POINTWISE = "abs celu cos erf exp expm1 log log1p relu rrelu selu sigmoid sin softmax sqrt square tanh threshold"
_OF_MODULES = {
    "torch": _POINTWISE,
    "torch.utils.data": "default_collate default_convert",
    "torch.optim.lr_scheduler.CyclicLR": "_triangular_scale_fn _triangular2_scale_fn _exp_range_scale_fn",
    "torch.optim.swa_utils.SWALR": "_linear_anneal _cosine_anneal",
    "torch.amp.grad_scaler": "_refresh_per_optimizer_state",
}
_FUNCTIONAL = ("torch.nn.functional", "torch._C._nn", "torch")
_NUMBERS = (int, float, bool, type(None))


@functools.cache
def listed_functions() -> dict[str, Callable[..., Any]]:
    """Return the functions that may travel, by name; some names are missing in some versions of torch."""
    found: dict[str, Callable[..., Any]] = {
        f"torch.nn.functional.{name}": function
        for name, function in vars(torch.nn.functional).items()
        if isinstance(function, types.FunctionType | types.BuiltinFunctionType)
        and not name.startswith("_")
        and getattr(function, "__module__", None) in _FUNCTIONAL
    }
    for path, names in _OF_MODULES.items():
        module, _, cls = path.rpartition(".") if path.endswith("LR") else (path, "", "")
        owner: Any = importlib.import_module(module)
        owner = getattr(owner, cls) if cls else owner
        found |= {f"{path}.{name}": function for name in names.split() if (function := getattr(owner, name, None))}
    return found


@functools.cache
def _names() -> dict[Callable[..., Any], str]:
    return {function: name for name, function in listed_functions().items()}


def function_named(name: Any) -> Callable[..., Any]:
    """Return the function of that name.

    Raises:
        UntrustedTypeError: If it may not travel.
    """
    if type(name) is not str or (found := listed_functions().get(name)) is None:
        raise UntrustedTypeError("a pickle names a function that may not travel: send plain data")
    return found


def _is_layer(function: Any) -> bool:
    """Return whether it is a class of torch's layers, which models keep to make more of them."""
    return (
        isinstance(function, type)
        and issubclass(function, torch.nn.Module)
        and function.__module__.startswith("torch.nn.modules.")
    )


def _partial_parts(partial: functools.partial[Any]) -> tuple[Any, ...] | None:
    """Return the parts of a listed function or layer with numbers filled in; None for any other partial."""
    values = [*partial.args, *partial.keywords.values()]
    function: Any = partial.func
    if not _is_layer(function):
        function = _names().get(function) if isinstance(function, types.FunctionType) else None
    if function is None or not all(type(value) in _NUMBERS for value in values):
        return None
    return "partial", function, partial.args, partial.keywords


def _make_partial(function: Any, args: Any, keywords: Any) -> functools.partial[Any]:
    if not _is_layer(function):
        function = function_named(function)
    if type(args) is not tuple or type(keywords) is not dict:
        raise UntrustedTypeError("a pickle fills arguments into a function that are none")
    if not all(type(value) in _NUMBERS for value in (*args, *keywords.values())):
        raise UntrustedTypeError("a pickle fills arguments into a function that are no numbers")
    return functools.partial(function, *args, **keywords)


# Optimisers travel with all of their attributes, of which torch's own ``__getstate__`` has three. The others are
# attributes of subclasses (LBFGS keeps a list of parameters), hooks, and a scheduler's wrapper of ``step()``.

_SCHEDULED = "_wrapped_by_lr_sched"  # marks torch's wrapper, see LRScheduler.__init__


class ScheduledStep:
    """Stands for a scheduler's wrapper of ``step()`` in the pickled state of an optimiser."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer


def reduce_optimizer(optimizer: Optimizer) -> Any:
    """Return an optimiser's ``__reduce_ex__`` value; NotImplemented where its class defines how it is pickled."""
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
    """Return whether it is an optimiser's ``step()`` in the wrapper of a scheduler."""
    return hasattr(step, _SCHEDULED)


def scheduled_step(optimizer: Any) -> Callable[..., Any]:
    """Wrap an optimiser's ``step()`` as a scheduler does, to learn whether it was called.

    Raises:
        SerializationError: If it is no optimiser.
    """
    if not isinstance(optimizer, Optimizer):
        raise SerializationError(f"a {type(optimizer).__qualname__} is no optimiser, whose step() could be wrapped")
    reference = weakref.ref(optimizer)  # the wrapper is an attribute of the optimiser

    @functools.wraps(type(optimizer).step)
    def step(*args: Any, **kwargs: Any) -> Any:
        owner: Any = reference()
        owner._opt_called = True
        return type(owner).step(owner, *args, **kwargs)

    setattr(step, _SCHEDULED, True)
    return step


# Other objects.


def _make_member(cls: Any, name: Any) -> enum.Enum:
    if not (isinstance(cls, type) and issubclass(cls, enum.Enum)):
        raise SerializationError(f"a {type(cls).__qualname__} is not an enum")
    if type(name) is int and issubclass(cls, enum.Flag):
        combined: enum.Flag = cls(name)
        return combined
    member = cls._member_map_.get(name) if type(name) is str else None
    if member is None:
        raise SerializationError(f"a pickle names a member that the enum {cls.__qualname__} does not have")
    return member


def _make_generator(device: Any, state: Any) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator


def _make_layout(name: Any) -> torch.layout:
    layout = getattr(torch, name, None)
    if not isinstance(layout, torch.layout):
        raise SerializationError("a pickle names a layout of tensors that torch does not have")
    return layout


def _make_array(typecode: Any, content: Any) -> array.array[Any]:
    if type(content) is not bytes or typecode not in tuple("bBhHiIlLqQfd"):  # text has 'u', which may be no text
        raise SerializationError("a pickle makes an array.array of parts that make none")
    return array.array(typecode, content)


MAKERS: dict[str, Callable[..., Any]] = {
    "exception": rebuild_exception,
    "member": _make_member,
    "torch_generator": _make_generator,
    "layout": _make_layout,
    "array.array": _make_array,
    "function": function_named,
    "partial": _make_partial,
    "scheduled_step": scheduled_step,
}
"""The function that makes an object from its parts, by kind."""
