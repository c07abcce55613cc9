"""Which types may be unpickled: one list for calls, results, snapshots and files.

Each entry is safe for a reason, which docs/security.md gives. A pickle that names only listed types, and uses them by
the rules of `rebuild`, cannot view raw memory (each listed type owns its memory and is made with its content), cannot
run the sender's code (no listed type calls any when it is made, filled or compared) and cannot open a file. Classes
of trusted packages are the exception: their author is the user.
"""

from __future__ import annotations

import ctypes
import enum
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from torchfedrpc import errors
from torchfedrpc.errors import SerializationError, UntrustedTypeError
from torchfedrpc.wire.encodings import FACTORY, function_named


@dataclass(frozen=True, slots=True)
class _Rule:
    """The uses of a type that a pickle may make, beside naming it as a value.

    Attributes:
        fits: Whether the type may be called with these arguments; None if it may not be called.
        has_instances: Whether instances may be made without a constructor and without arguments.
        state: Whether an instance may have this state; None if it may have none.
    """

    fits: Callable[[tuple[Any, ...]], bool] | None = None
    has_instances: bool = False
    state: Callable[[Any], bool] | None = None


def _kinds(*kinds: type, least: int | None = None) -> Callable[[tuple[Any, ...]], bool]:
    """Accept arguments of exactly these types; arguments from number ``least`` on may be missing."""
    num_least = len(kinds) if least is None else least
    return lambda args: len(args) >= num_least and tuple(map(type, args)) == kinds[: len(args)]


def _any_state(state: Any) -> bool:
    return True


def _fits_defaultdict(args: tuple[Any, ...]) -> bool:
    """Accept factories that make an empty value: it is called for a missing key."""
    return len(args) <= 1 and all(
        factory is None or isinstance(factory, type) or factory is function_named(FACTORY) for factory in args
    )


def _fits_deque(args: tuple[Any, ...]) -> bool:
    return args in ((), ((),)) or (len(args) == 2 and args[0] == () and type(args[1]) in (int, type(None)))


def _fits_date(args: tuple[Any, ...]) -> bool:
    return bool(args) and type(args[0]) is bytes


_MAX_BITS = 1 << 11  # of a fraction's numbers: cancelling takes the square of that


def _fits_fraction(args: tuple[Any, ...]) -> bool:
    match args:
        case (int(above), int(below)) if above.bit_length() + below.bit_length() <= _MAX_BITS and below > 0:
            return math.gcd(above, below) == 1
    return False


_DECIMAL = re.compile(r"[-+]?(?:\d++(?:\.\d*+)?(?:[eE][-+]?\d{1,20})?|\.\d++|Infinity|s?NaN\d*+)", re.ASCII)


def _fits_decimal(args: tuple[Any, ...]) -> bool:
    return len(args) == 1 and type(args[0]) is str and _DECIMAL.fullmatch(args[0]) is not None


def _fits_path(args: tuple[Any, ...]) -> bool:
    return all(type(part) is str for part in args)


def _fits_size(args: tuple[Any, ...]) -> bool:
    return len(args) == 1 and type(args[0]) is tuple and all(type(size) is int for size in args[0])


_RANDOM_WORDS = 625


def _is_random_state(state: Any) -> bool:
    match state:
        case (3, tuple(words), None | float()):
            return len(words) == _RANDOM_WORDS and set(map(type, words)) == {int}
    return False


def _is_uuid_state(state: Any) -> bool:
    return type(state) is dict and type(state.get("int")) is int


_NAMED = _Rule()
_PLAIN = _Rule(has_instances=True, state=_any_state)
_DATE, _PATH = _Rule(_fits_date), _Rule(_fits_path)
_PATHS = dict.fromkeys(("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath"), _PATH)
_VALUES = "Ellipsis NotImplemented bool bytes dict float frozenset int list set str tuple"
_TABLE: dict[str, dict[str, _Rule]] = {
    "builtins": {
        **dict.fromkeys(_VALUES.split(), _NAMED),
        "complex": _Rule(_kinds(float, float)),
        "object": _Rule(has_instances=True),
        "range": _Rule(_kinds(int, int, int)),
        "slice": _Rule(lambda args: len(args) == 3),
    },
    "collections": {
        **dict.fromkeys(("ChainMap", "UserDict", "UserList"), _PLAIN),
        "Counter": _Rule(_kinds(dict)),
        "OrderedDict": _Rule(_kinds(), state=_any_state),
        "defaultdict": _Rule(_fits_defaultdict),
        "deque": _Rule(_fits_deque),
    },
    "datetime": {
        **dict.fromkeys(("date", "datetime", "time"), _DATE),
        "timedelta": _Rule(_kinds(int, int, int)),
        "timezone": _Rule(_kinds(timedelta, str, least=1)),
    },
    "decimal": {"Decimal": _Rule(_fits_decimal)},
    "fractions": {"Fraction": _Rule(_fits_fraction)},
    "numpy": {"dtype": _NAMED},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,  # from Python 3.13 on
    "random": {"Random": _Rule(_kinds(), state=_is_random_state)},
    "torch": {"Size": _Rule(_fits_size), "device": _Rule(_kinds(str, int, least=1))},
    "torchfedrpc.events": {"RoundEnded": _PLAIN},
    "torchfedrpc.reduce.reducers": dict.fromkeys(("Entry", "Mean", "Sum", "WeightedMean"), _PLAIN),
    "torchfedrpc.reduce.tree": {"MergeError": _PLAIN},
    "types": {"SimpleNamespace": _Rule(_kinds(), has_instances=True, state=_any_state)},
    "uuid": {"UUID": _Rule(has_instances=True, state=_is_uuid_state)},  # its __setstate__ stores two numbers
}
LISTED = {(module, name): rule for module, rules in _TABLE.items() for name, rule in rules.items()}
"""Rules by module and name."""


def _rule_of(cls: type) -> _Rule:
    """Return the rule of a listed class; for any other class the rule that a pickle may only name it."""
    rule = LISTED.get((cls.__module__, cls.__qualname__))
    if rule is None or getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        return _NAMED
    return rule


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
# No package's pickle may make instances of these classes: they view memory, or are made without writing it.
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
        trusted: Names of top-level packages; of a module's full name the first part counts.
    """

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        self.trusted = frozenset(_root(module) for module in trusted) - _NEVER_TRUSTED
        self._may_have_instances: dict[type, bool] = {}

    def find(self, module: str, name: str) -> Any:
        """Return the object of that name.

        Raises:
            UntrustedTypeError: If it is outside the list.
        """
        if (module, name) in LISTED:
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
        """Return whether a pickle may make an instance of that class without its constructor."""
        if not isinstance(cls, type):
            return False
        known = self._may_have_instances.get(cls)
        if known is None:
            known = _rule_of(cls).has_instances or _is_of_torch(cls) or self.is_trusted(cls)
            self._may_have_instances[cls] = known
        return known

    def state_check(self, cls: type) -> Callable[[Any], bool] | None:
        """Return the check of a state of the class's instances; None if they may have no state."""
        check = _rule_of(cls).state
        if check is None and cls is not object and self.may_have_instances(cls):
            return _any_state
        return check

    def constructor(self, function: Any, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        """Return a callable if a pickle may call it with these arguments.

        Raises:
            UntrustedTypeError: If it may not be called.
            SerializationError: If pickling never writes such arguments for it.
        """
        if isinstance(function, type):
            if (fits := _rule_of(function).fits) is not None:
                if not fits(arguments):
                    raise SerializationError(
                        f"a pickle makes a {function.__qualname__} of other arguments than pickling gives it"
                    )
                return function
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
            if owner is None and _root(module) == "__main__":
                raise UntrustedTypeError(
                    f"{module}.{name} may not travel: this process does not have it; a class of an interactive "
                    f"session reaches workers as it is when the proxy is opened (open it again), if it can be pickled"
                )
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
    """Return the next step for a name that is not on the list, without importing anything."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    root = _root(module)
    if found is not None and not isinstance(found, type):
        return f"it is a {type(found).__name__} and no class; {_LEAVE_OUT}"
    if root in sys.stdlib_module_names or root in _LIBRARIES:
        return f"it is of {root if root in _LIBRARIES else 'the standard library'}; {_LEAVE_OUT}"
    return f"if you trust its package, name it in runtime.trusted_modules=[{root}]; else {_LEAVE_OUT}"


def _find_known(module: str, name: str) -> Any:
    """Return an exception, enum, constant or class of torch that is allowed by rule and imported; else None."""
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
    if issubclass(entry, BaseException):  # made by the constructor of a builtin exception
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


def canonical(module: str) -> str:
    """Return the name of a module; a script's own goes by another name in worker processes that import it."""
    return "__main__" if module == "__mp_main__" else module


def _root(module: str) -> str:
    return canonical(module).partition(".")[0]
