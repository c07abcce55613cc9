"""Recipes: plain mappings with a ``_target_`` from which any process can build an object.

A learner receives recipes from the driver, over the network. So a recipe may call only targets meant for that:
datasets and models of this library, modules of ``torch.nn``, optimisers and schedules of ``torch.optim``, and classes
and functions defined by the learner's package or by packages in ``runtime.trusted_modules``. The rule is the same in
every mode, and for the driver's recipes.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import PathFinder
from typing import Any

import torch
from torch import nn

from torchfedrpc.errors import ConfigError, suggest
from torchfedrpc.host.context import current_call
from torchfedrpc.wire.allowlist import AllowList, canonical

_OWN_KEYS = ("_target_", "_args_", "_partial_")  # hydra's
_OURS = ("torchfedrpc.experiments.data.", "torchfedrpc.experiments.models.")
_TORCH: dict[str, tuple[type, ...]] = {  # package -> base classes of what recipes may name in it
    "torch.nn.": (nn.Module,),
    "torch.optim.": (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler),
}
_INSTALL = "install the package, or put the folder that it is in on PYTHONPATH, for the driver and its workers"
_NEVER_WHOLE = ("torch", "torchfedrpc")  # both contain functions that run arbitrary commands or scripts


def build(recipe: Mapping[str, Any], trusted_modules: Iterable[str] | None = None, /, **extra: Any) -> Any:
    """Call a recipe's target and return its result; exceptions of the target are propagated.

    A learner builds its model by ``tfr.build(model)``, and the training set by ``tfr.build(dataset).train``.

    Args:
        recipe: ``_target_`` is the dotted name of a class or function, ``_args_`` its positional arguments; the other
            keys are keyword arguments. Nested recipes are built first. With ``_partial_`` the result is a
            `functools.partial` of the call.
        trusted_modules: Packages with classes and functions that the recipe may name, beside those always allowed.
            Default: In a call those that its run trusts, else none.
        extra: Further keyword arguments, passed unchanged.

    Raises:
        ConfigError: If the recipe has no target, or its target cannot be found or is not allowed.
    """
    check_trusted(recipe, _trusted_here() if trusted_modules is None else trusted_modules)
    return _made(recipe, extra)


def check_trusted(recipe: Mapping[str, Any], trusted_modules: Iterable[str]) -> None:
    """Check that all targets of a recipe may be called; modules that are not trusted are not imported.

    Raises:
        ConfigError: If the recipe has no target, or a target cannot be found or is not allowed.
    """
    _check_has_target(recipe)
    trusted = AllowList(trusted_modules).trusted
    for target in _targets(recipe):
        _find_trusted(target, trusted)


def locate(recipe: Mapping[str, Any], /) -> Any:
    """Return the class or function that a recipe names, of any package; only for the driver's configuration.

    Raises:
        ConfigError: If the recipe has no target, or its target cannot be found.
    """
    _check_has_target(recipe)
    *_, found = _entries(recipe["_target_"])
    return found


def _trusted_here() -> Iterable[str]:
    try:
        return current_call().trusted_modules
    except RuntimeError:  # outside of calls
        return ()


def _made(value: Any, extra: Mapping[str, Any] | None = None) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_made, value)) if type(value) in (list, tuple) else value
    if not isinstance(value, Mapping):
        return value
    if "_target_" not in value:
        return {key: _made(item) for key, item in value.items()}
    args = _made(list(value.get("_args_", ())))
    kwargs = {key: _made(item) for key, item in value.items() if key not in _OWN_KEYS} | dict(extra or {})
    *_, target = _entries(value["_target_"])
    return functools.partial(target, *args, **kwargs) if value.get("_partial_") else target(*args, **kwargs)


def _targets(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield value["_target_"]
        for item in value.values():
            yield from _targets(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _targets(item)


def _find_trusted(target: Any, trusted: frozenset[str]) -> None:
    """Check that a recipe may call a target.

    Raises:
        ConfigError: If the target cannot be found, or is outside the packages that recipes may name.
    """
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) < 2 or not all(map(str.isidentifier, parts)):
        raise ConfigError(f"a recipe's _target_ is a dotted name such as mypackage.models.Net, not {target!r}")
    root = canonical(parts[0])
    if root in trusted and root not in _NEVER_WHOLE:
        if any(part.startswith("__") for part in parts[1:]):
            raise _untrusted(target, root)
        for entry in _entries(target):
            home = _home(entry)
            if canonical(home.partition(".")[0]) not in trusted:
                raise _untrusted(target, home)
        return
    if not target.startswith((*_OURS, *_TORCH)) or any(part.startswith("_") for part in parts):
        raise _untrusted(target, root)
    entries = list(_entries(target))
    if len(entries) > 1 or not _is_for_all(entries[0]):
        raise _untrusted(target, root)


def _is_for_all(entry: Any) -> bool:
    """Return whether recipes may call an object without trusted packages: it makes data, a layer, or an optimiser."""
    home = _home(entry)
    if f"{home}.".startswith(_OURS):
        return True
    return any(
        home.startswith(package) and isinstance(entry, type) and issubclass(entry, bases)
        for package, bases in _TORCH.items()
    )


def _home(entry: Any) -> str:
    """Return the module that defines a class or a function; empty for other objects."""
    if isinstance(entry, types.ModuleType) or not callable(entry) or not hasattr(entry, "__qualname__"):
        return ""
    home = getattr(entry, "__module__", None)
    return home if isinstance(home, str) else ""


def _entries(target: str) -> Iterator[Any]:
    """Yield the objects named by a dotted name after its module, one after another.

    Raises:
        ConfigError: If an object does not exist.
    """
    parts = target.split(".")
    owner: Any = None
    for count in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:count])
        if "__main__" in parts[1:count]:
            continue  # importing it would run it
        try:
            owner = importlib.import_module(canonical(name))
            break
        except ModuleNotFoundError as error:
            if not name.startswith(str(error.name)) or count == 1:
                raise ConfigError(f"cannot find {target!r}: {error}; {_INSTALL}") from error
        except ImportError as error:
            raise ConfigError(f"cannot find {target!r}: {error}") from error
    if owner is None:
        raise ConfigError(f"cannot find {target!r}: it is a dotted name of no class and no function")
    for part in parts[count:]:
        try:
            owner = getattr(owner, part)
        except AttributeError as error:
            raise ConfigError(f"cannot find {target!r}: {error}{suggest(part, _names(owner))}") from error
        yield owner


def _names(owner: Any) -> set[str]:
    """Return the public names in a module, submodules included, or in a class."""
    modules = {module.name for module in pkgutil.iter_modules(getattr(owner, "__path__", ()))}
    return {name for name in modules | {*dir(owner)} if not name.startswith("_")}


def _untrusted(target: str, home: str) -> ConfigError:
    root = canonical(home.partition(".")[0])
    if root in _NEVER_WHOLE or root in sys.stdlib_module_names or not root:
        advice = "write a function in a package of yours that calls it, and name that package in"
        remedy = f"{advice} runtime.trusted_modules"
    else:
        remedy = f"if you trust its package, add that to the others in runtime.trusted_modules=[{root}]"
        if root not in sys.modules and PathFinder.find_spec(root) is None:  # find_spec imports nothing
            remedy += f", and {_INSTALL}"
    return ConfigError(
        f"a recipe may not call {target}: recipes may name the data sets and models of torchfedrpc, modules of "
        f"torch.nn, optimisers and schedules of torch.optim, and classes and functions that the learner's own "
        f"package and runtime.trusted_modules define; {remedy}"
    )


def _check_has_target(recipe: Mapping[str, Any]) -> None:
    if not isinstance(recipe, Mapping) or not isinstance(recipe.get("_target_"), str):
        raise ConfigError(f"a recipe needs _target_, the dotted name of what makes it; this has none: {recipe!r}")
