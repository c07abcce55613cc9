"""Which types may be unpickled: one list for calls, results, snapshots and files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from torchfedrpc import errors
from torchfedrpc.errors import UntrustedTypeError
from torchfedrpc.wire import arrays

# Named one by one: types of plain data, and the functions by which numpy and torch rebuild theirs.
_LISTED = {
    "builtins": "Ellipsis NotImplemented bool complex dict float frozenset int list object range set slice str tuple",
    "collections": "ChainMap Counter OrderedDict defaultdict deque",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "pathlib": "Path PosixPath PurePath PurePosixPath",
    "random": "Random",
    "types": "SimpleNamespace",
    "uuid": "UUID",
    "numpy._core.multiarray": "scalar",
    "numpy._core.numeric": "_frombuffer",
    "numpy.core.multiarray": "scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy.random._mt19937": "MT19937",
    "numpy.random._pcg64": "PCG64 PCG64DXSM",
    "numpy.random._philox": "Philox",
    "numpy.random._sfc64": "SFC64",
    "numpy.random._pickle": "__bit_generator_ctor __generator_ctor __randomstate_ctor",
    "numpy.random.bit_generator": "SeedSequence __pyx_unpickle_SeedSequence",
    "torch": "Size device",
    "torchfedrpc.host.reducers": "Entry Mean Sum WeightedMean",
    "torchfedrpc.host.reduction": "MergeError",
    "torchfedrpc.observe.events": "RoundEnded",
    "torch._C": "Generator",
    "torch.serialization": "_get_layout",
    # Exceptions that learners let through from the standard library; builtins, torch and numpy have theirs by rule.
    "_csv": "Error",
    "_pickle": "PicklingError UnpicklingError",
    "_queue": "Empty",
    "json.decoder": "JSONDecodeError",
    "pickle": "PickleError PicklingError UnpicklingError",
    "queue": "Empty Full",
    "struct": "error",
    "subprocess": "CalledProcessError SubprocessError TimeoutExpired",
    "urllib.error": "ContentTooShortError HTTPError URLError",
    "zipfile": "BadZipFile LargeZipFile",
    "zlib": "error",
}
_LISTED_NAMES = frozenset((module, name) for module, names in _LISTED.items() for name in names.split())
# What numpy's pickles name and would run unchecked.
_REPLACED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): arrays.make_dtype,
    ("numpy", "ndarray"): arrays.ArrayClass(np.ndarray),
    ("numpy._core.multiarray", "_reconstruct"): arrays.reconstruct,
    ("numpy.core.multiarray", "_reconstruct"): arrays.reconstruct,
}

_TORCH_CLASS_FAMILIES = (
    ("torch.nn.modules.", torch.nn.Module),
    ("torch.optim.", torch.optim.Optimizer),
    ("torch.optim.", torch.optim.lr_scheduler.LRScheduler),
)
_CONSTANT_KINDS = (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)


class AllowList:
    """Resolves the globals that a pickle names, or refuses them.

    Allowed are plain builtins and containers, torch's and numpy's reconstruction functions, ``torch.nn`` modules
    and ``torch.optim`` classes, exceptions, and any class or enum *defined* in a trusted package: never a function
    of it, and never a name that it merely imported.

    Args:
        trusted: top-level package names (or full module names, of which the first part counts).
    """

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        # The bundled learners need no class of this library to travel, so it is never trusted as a whole.
        self.trusted = frozenset(_root(module) for module in trusted) - {"torchfedrpc"}

    def find(self, module: str, name: str) -> Any:
        """The object of that name, or what stands for it in a pickle.

        Raises:
            UntrustedTypeError: it is outside the list.
        """
        if (replacement := _REPLACED.get((module, name))) is not None:
            return replacement
        if (module, name) in _LISTED_NAMES:
            return getattr(importlib.import_module(module), name)
        if _root(module) in self.trusted:
            return self._find_trusted(module, name)
        known = _find_known(module, name)
        if known is not None:
            return known
        raise UntrustedTypeError(
            f"{module}.{name} is not a type that may travel. If it is a class of yours, name its package in "
            f"runtime.trusted_modules=[{_root(module)}]; else send plain data (tensors, numbers, lists, dicts)"
        )

    def _find_trusted(self, module: str, name: str) -> Any:
        if module.endswith(".__main__"):
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
                    f"allowed, no functions and no names that it imported"
                )
        return arrays.ArrayClass(owner) if issubclass(owner, np.ndarray) else owner


def _find_known(module: str, name: str) -> Any:
    """What is allowed by rule: exceptions, and constants and classes of torch, where already imported."""
    if module == "torch._utils":  # torch pickles memory formats as ("torch._utils", "torch.channels_last")
        module, name = "torch", name.removeprefix("torch.")
    if "." in name or module not in sys.modules:
        return None
    entry = getattr(sys.modules[module], name, None)
    if module == "torch" and isinstance(entry, _CONSTANT_KINDS):
        return entry
    if not isinstance(entry, type):
        return None
    if issubclass(entry, BaseException):
        return entry if module == errors.__name__ or _root(module) in ("builtins", "torch", "numpy") else None
    for prefix, family in _TORCH_CLASS_FAMILIES:
        if entry.__module__ == module and module.startswith(prefix) and issubclass(entry, family):
            return entry
    return None


def canonical(module: str) -> str:
    """The script's own module goes by another name in worker processes that import it."""
    return "__main__" if module == "__mp_main__" else module


def _root(module: str) -> str:
    return canonical(module).partition(".")[0]
