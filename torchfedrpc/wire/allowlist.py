"""Which types may be unpickled: one list for calls, results, snapshots and files.

Each entry is safe for a reason. A pickle that names types of this list only, whatever it does with them by the rules
of `rebuild`, cannot get at raw memory (no type here views memory that it does not own, and none is made without its
content), cannot call back (no instance here runs code that the sender chose when it is made, filled or compared) and
cannot read or write a file (no constructor here opens one). Classes of trusted packages are the exception: they are
the user's. docs/trust.md has the reason for each entry.
"""

from __future__ import annotations

import ctypes
import enum
import importlib
import math
import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PosixPath, PurePath, PurePosixPath, PureWindowsPath
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from torchfedrpc import errors
from torchfedrpc.errors import SerializationError, UntrustedTypeError
from torchfedrpc.wire.encodings import FACTORY, function_named

# Types whose instances pickling makes without their constructor, and fills by attributes: their content is data.
_PLAIN_OBJECTS = {
    "collections": "ChainMap UserDict UserList",
    "types": "SimpleNamespace",
    "uuid": "UUID",  # its __setstate__ stores two numbers
    "torchfedrpc.reduce.reducers": "Entry Mean Sum WeightedMean",
    "torchfedrpc.reduce.tree": "MergeError",
    "torchfedrpc.events": "RoundEnded",
}
# Types that a pickle may name, as the value of an attribute say, and call only as `_CONSTRUCTORS` allows.
_NAMED = {
    "builtins": "Ellipsis NotImplemented bool bytes complex dict float frozenset int list object range set "
    "slice str tuple",
    "collections": "Counter OrderedDict defaultdict deque",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "numpy": "dtype",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath",  # from Python 3.13 on
    "random": "Random",
    "torch": "Size device",
}
_LISTED = frozenset(
    (module, name) for part in (_PLAIN_OBJECTS, _NAMED) for module, names in part.items() for name in names.split()
)

# Plain classes of torch's: their instances are made without the constructor, their __setstate__ fills attributes in.
_TORCH_FAMILIES = (
    ("torch.nn.modules.", "torch.nn", "Module"),
    ("torch.nn.utils.", "torch.nn", "Module"),
    ("torch.optim.", "torch.nn", "Module"),  # averaged models
    ("torch.optim.", "torch.optim", "Optimizer"),
    ("torch.optim.", "torch.optim.lr_scheduler", "LRScheduler"),
    ("torch.utils.data.", "torch.utils.data", "Dataset"),
    ("torch.utils.data.", "torch.utils.data", "Sampler"),
    ("torch.utils.data.", "torch.utils.data", "DataLoader"),
    ("torch.amp.", "torch.amp", "GradScaler"),
    ("torch.cuda.amp.", "torch.amp", "GradScaler"),
)
_OPENS_FILES = "torch.utils.data.datapipes."  # pipes of these read files as they are iterated
_CONSTANT_KINDS = (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)
# Classes whose instances view memory, or are made without it being written: of no package from a pickle.
_RAW_MEMORY: tuple[Any, ...] = (
    np.ndarray,
    np.generic,
    torch.Tensor,
    torch.UntypedStorage,
    torch.TypedStorage,
    ctypes.Structure.__base__,
)
_NEVER_TRUSTED = frozenset({"torchfedrpc", "builtins"})  # ours need no class to travel; `type` makes classes


class AllowList:
    """Resolves the globals that a pickle names, or refuses them.

    Allowed are plain builtins and containers, ``torch.nn`` modules, ``torch.optim`` and ``torch.utils.data`` classes,
    exceptions of torch, numpy and the standard library, and any class or enum *defined* in a trusted package: never
    a function of it, and never a name that it merely imported.

    Args:
        trusted: top-level package names (or full module names, of which the first part counts).
    """

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        self.trusted = frozenset(_root(module) for module in trusted) - _NEVER_TRUSTED
        self._may_have_instances: dict[type, bool] = {}

    def find(self, module: str, name: str) -> Any:
        """Return the object of that name.

        Raises:
            UntrustedTypeError: If it is outside the list.
        """
        if (module, name) in _LISTED:
            try:
                return getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError) as error:
                raise UntrustedTypeError(f"{module}.{name} may not travel: {error}") from error
        if (known := _find_known(module, name)) is not None:
            return known
        if _root(module) in self.trusted:
            return self._find_trusted(module, name)
        raise UntrustedTypeError(f"{module}.{name} is not a type that may travel: {_advice(module, name)}")

    def is_trusted(self, cls: Any) -> bool:
        """Whether it is a class of a trusted package."""
        return (
            isinstance(cls, type)
            and _root(cls.__module__) in self.trusted
            and not issubclass(cls, (*_RAW_MEMORY, type, enum.Enum))
        )

    def may_have_instances(self, cls: Any) -> bool:
        """Whether a pickle may make an instance of that class without its constructor."""
        if not isinstance(cls, type):
            return False
        known = self._may_have_instances.get(cls)
        if known is None:
            known = cls is object or cls in _plain_objects() or _is_of_torch(cls) or self.is_trusted(cls)
            self._may_have_instances[cls] = known
        return known

    def may_have_state(self, cls: type) -> bool:
        """Whether a pickle may set attributes of an instance of that class."""
        return cls in (OrderedDict, Random) or (cls is not object and self.may_have_instances(cls))

    def constructor(self, function: Any) -> Callable[..., Any]:
        """Return what a pickle may call in place of a function that it names.

        Raises:
            UntrustedTypeError: If it may not be called.
        """
        if isinstance(function, type):
            if (constructor := _CONSTRUCTORS.get(function)) is not None:
                return constructor
            if self.is_trusted(function):
                return function
        name = getattr(function, "__qualname__", None) or f"a {type(function).__qualname__}"
        raise UntrustedTypeError(f"a pickle calls {name}, which pickling never does")

    def _find_trusted(self, module: str, name: str) -> Any:
        if "__main__" in module.split(".")[1:]:
            raise UntrustedTypeError(f"{module}.{name} may not travel: to import {module} would run it")
        try:
            owner: Any = importlib.import_module(canonical(module))
        except ImportError as error:
            raise UntrustedTypeError(f"{module}.{name} may not travel: {error}") from error
        for part in name.split("."):
            owner = vars(owner).get(part) if isinstance(owner, type) else getattr(owner, part, None)
            if not isinstance(owner, type) or _root(owner.__module__) != _root(module):
                raise UntrustedTypeError(
                    f"{module}.{name} may not travel: of a trusted package only classes that it defines itself are "
                    f"allowed, no functions and no names that it imported; {_LEAVE_OUT}"
                )
        if _root(module) in _LIBRARIES and issubclass(owner, _RAW_MEMORY):
            raise UntrustedTypeError(f"{module}.{name} may not travel: called, it would view memory; {_LEAVE_OUT}")
        return owner


_LIBRARIES = ("numpy", "torch")
_LEAVE_OUT = (
    "send plain data (tensors, numbers, lists, dicts), and leave it out of a learner's state by "
    "not_state or state_dict()"
)


def _advice(module: str, name: str) -> str:
    """Say what to do about a name that is not on the list; nothing is imported for that."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    root = _root(module)
    if found is not None and not isinstance(found, type):
        return f"it is a {type(found).__name__} and no class; {_LEAVE_OUT}"
    if root in sys.stdlib_module_names or root == "numpy":
        return f"it is of {'numpy' if root == 'numpy' else 'the standard library'}; {_LEAVE_OUT}"
    return f"if it is a class of yours, name its package in runtime.trusted_modules=[{root}]; else {_LEAVE_OUT}"


def _find_known(module: str, name: str) -> Any:
    """Return what is allowed by rule, where already imported: exceptions, enums, constants and classes of torch."""
    if module == "torch._utils":  # torch pickles memory formats as ("torch._utils", "torch.channels_last")
        module, name = "torch", name.removeprefix("torch.")
    if "." in name or module not in sys.modules:
        return None
    entry = vars(sys.modules[module]).get(name)  # not by getattr, which may import or call something
    if module == "torch" and isinstance(entry, _CONSTANT_KINDS):
        return entry
    if not isinstance(entry, type):
        return None
    root = _root(module)
    if issubclass(entry, BaseException):  # they are made without a constructor of their own
        is_known = root in _LIBRARIES or root in sys.stdlib_module_names
        return entry if module == errors.__name__ or is_known else None
    if issubclass(entry, enum.Enum):  # a pickle only looks members up
        return entry if root in sys.stdlib_module_names else None
    if module == "numpy" and issubclass(entry, np.generic):
        return entry
    return entry if entry.__module__ == module and _is_of_torch(entry) else None


def _is_of_torch(cls: type) -> bool:
    module = cls.__module__
    if not module.startswith("torch.") or module.startswith(_OPENS_FILES):
        return False
    return any(
        f"{module}.".startswith(prefix)
        and base_module in sys.modules
        and issubclass(cls, getattr(sys.modules[base_module], base))
        for prefix, base_module, base in _TORCH_FAMILIES
    )


def _plain_objects() -> frozenset[type]:
    """Return the classes of `_PLAIN_OBJECTS`, where imported."""
    return frozenset(
        getattr(sys.modules[module], name)
        for module, names in _PLAIN_OBJECTS.items()
        if module in sys.modules
        for name in names.split()
    )


# What pickles may call: each constructor with the arguments that pickling gives it, and no others.

_MAX_BITS = 1 << 11  # of a fraction's numbers: cancelling takes the square of that


def _refusal(cls: type) -> SerializationError:
    return SerializationError(f"a pickle makes a {cls.__qualname__} of other arguments than pickling gives it")


def _of(cls: Any, *kinds: type, least: int | None = None) -> Callable[..., Any]:
    """Return the constructor, for arguments of exactly these types; those from number ``least`` on may be missing."""
    num_least = len(kinds) if least is None else least

    def make(*args: Any) -> Any:
        if len(args) < num_least or tuple(map(type, args)) != kinds[: len(args)]:
            raise _refusal(cls)
        return cls(*args)

    return make


def _path(cls: Any) -> Callable[..., Any]:
    def make(*parts: Any) -> Any:
        if not all(type(part) is str for part in parts):
            raise _refusal(cls)
        return cls(*parts)

    return make


def _make_defaultdict(*args: Any) -> Any:
    """It calls its factory for a missing key: a type makes an empty value, any other function would run."""
    if len(args) > 1 or not all(map(_is_factory, args)):
        raise _refusal(defaultdict)
    return defaultdict(*args)


def _is_factory(factory: Any) -> bool:
    return factory is None or isinstance(factory, type) or factory is function_named(FACTORY)


def _make_deque(*args: Any) -> Any:
    if args not in ((), ((),)) and not (len(args) == 2 and args[0] == () and type(args[1]) in (int, type(None))):
        raise _refusal(deque)
    return deque(*args)


def _make_slice(*args: Any) -> Any:
    if len(args) != 3:
        raise _refusal(slice)
    return slice(*args)


def _make_fraction(*args: Any) -> Any:
    match args:
        case (int(above), int(below)) if above.bit_length() + below.bit_length() <= _MAX_BITS and below > 0:
            if math.gcd(above, below) == 1:
                return Fraction(above, below)
    raise _refusal(Fraction)


_DECIMAL = re.compile(r"[-+]?(?:\d++(?:\.\d*+)?(?:[eE][-+]?\d{1,20})?|\.\d++|Infinity|s?NaN\d*+)", re.ASCII)


def _make_decimal(*args: Any) -> Any:
    if len(args) != 1 or type(args[0]) is not str or not _DECIMAL.fullmatch(args[0]):
        raise _refusal(Decimal)
    return Decimal(args[0])


def _make_date(cls: Any) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        if not args or type(args[0]) is not bytes:
            raise _refusal(cls)
        return cls(*args)

    return make


def _make_size(*args: Any) -> Any:
    if len(args) != 1 or type(args[0]) is not tuple or not all(type(size) is int for size in args[0]):
        raise _refusal(torch.Size)
    return torch.Size(args[0])


_CONSTRUCTORS: dict[type, Callable[..., Any]] = {
    OrderedDict: _of(OrderedDict),
    Random: _of(Random),
    SimpleNamespace: _of(SimpleNamespace),
    Counter: _of(Counter, dict),
    defaultdict: _make_defaultdict,
    deque: _make_deque,
    complex: _of(complex, float, float),
    range: _of(range, int, int, int),
    slice: _make_slice,
    date: _make_date(date),
    time: _make_date(time),
    datetime: _make_date(datetime),
    timedelta: _of(timedelta, int, int, int),
    timezone: _of(timezone, timedelta, str, least=1),
    Decimal: _make_decimal,
    Fraction: _make_fraction,
    torch.Size: _make_size,
    torch.device: _of(torch.device, str, int, least=1),
} | {cls: _path(cls) for cls in (Path, PosixPath, PurePath, PurePosixPath, PureWindowsPath)}


def canonical(module: str) -> str:
    """Return the name of a module; a script's own goes by another name in worker processes that import it."""
    return "__main__" if module == "__mp_main__" else module


def _root(module: str) -> str:
    return canonical(module).partition(".")[0]
