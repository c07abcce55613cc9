"""Modules of the user: imported by name, or found in the current folder by the names that they register."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torchfedrpc.errors import ConfigError, TorchFedRpcError, suggest
from torchfedrpc.registry import Registry, aggregators, cohorts, datasets, learners, models, partitions, trainers

KINDS: dict[str, Registry[Any]] = {
    "trainer": trainers,
    "learner": learners,
    "dataset": datasets,
    "model": models,
    "partition": partitions,
    "aggregator": aggregators,
    "cohort": cohorts,
}
"""Hydra group -> registry of its options."""

_OWN_FRAMES = ("<frozen importlib", importlib.__file__, __file__)


def add_current_folder_to_path() -> None:
    """Let modules of the current folder be imported, as with ``python -m``; installed ones come first."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)


def import_user_module(name: str) -> ModuleType:
    """Import a module that may register classes.

    Raises:
        ConfigError: If there is no such module, or it cannot be imported; the message has its whole traceback.
    """
    try:
        return importlib.import_module(name)
    except TorchFedRpcError as error:
        error.add_note(f"in the module {name}, as it was imported")
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed_import(name, error) from error
        near = suggest(error.name, [path.stem for path in Path.cwd().glob("*.py")])
        raise ConfigError(
            f"imports={name}: there is no module {error.name}{near}; it must be in the current folder {Path.cwd()}, "
            f"on PYTHONPATH, or installed, on the driver and its workers"
        ) from None
    except (Exception, SystemExit) as error:
        raise _failed_import(name, error) from error


def find(kind: str, name: str) -> Any | None:
    """Return the class or function that is registered under a name, or that a file of the current folder registers.

    Args:
        kind: A key of `KINDS`.
        name: The name.

    Returns:
        The class or function; None if there is none.

    Raises:
        ConfigError: If the file that registers it cannot be imported, or several do.
    """
    registry = KINDS[kind]
    if name not in registry.names():
        _import_from_folder(kind, name)
    return registry.get(name) if name in registry.names() else None


def names(kind: str) -> list[str]:
    """Return the names that are registered, and those that files of the current folder would register."""
    of_files = (name for path in _files() for name in _registered(path, kind))
    return sorted({*KINDS[kind].names(), *of_files})


def is_bundled(entry: Any) -> bool:
    """Return whether a registered class or function is torchfedrpc's own."""
    return f"{entry.__module__}.".startswith("torchfedrpc.")


def target_of(entry: Any) -> str:
    """Return the ``_target_`` of a class or function."""
    return f"{entry.__module__}.{entry.__qualname__}"


def _import_from_folder(kind: str, name: str) -> None:
    """Import the file of the current folder that registers a name, if there is one. No other file is imported."""
    found = [path for path in _files() if name in _registered(path, kind, name)]
    if len(found) > 1:
        files = " and ".join(path.name for path in found)
        raise ConfigError(f"the {kind} {name!r} is registered by {files} in {Path.cwd()}: rename one of them")
    for path in found:
        if not path.stem.isidentifier():
            raise ConfigError(f"{path} registers the {kind} {name!r}, but no module can be named so: rename the file")
        module = import_user_module(path.stem)
        file = getattr(module, "__file__", None)
        if file is None or not path.samefile(file):
            raise ConfigError(
                f"{path} registers the {kind} {name!r}, but {path.stem} is already the name of another module, "
                f"{file or 'of Python'}: rename the file"
            )


def _files() -> list[Path]:
    return sorted(Path.cwd().glob("*.py"))


def _registered(path: Path, kind: str, wanted: str = "") -> Iterator[str]:
    """Yield the names that a file registers by calls such as ``tfr.trainer("name")``, without importing it.

    Args:
        path: The file.
        kind: What they register.
        wanted: The name that is looked for. Then a file with a wrong syntax counts if it seems to register that.
    """
    try:
        source = path.read_bytes()
    except OSError:
        return
    if kind.encode() not in source or wanted.encode() not in source:
        return
    try:
        with warnings.catch_warnings(action="ignore"):
            nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):
        if wanted and re.search(rf"\b{kind}\(\s*[\"']{re.escape(wanted)}[\"']".encode(), source):
            yield wanted
        return
    for node in nodes:
        match node:
            case ast.Call(
                func=ast.Attribute(attr=function) | ast.Name(id=function),
                args=[ast.Constant(value=str(name)), *_],
            ) if function == kind:
                yield name


def _failed_import(name: str, error: BaseException) -> ConfigError:
    report = traceback.TracebackException.from_exception(error)
    frames = list(report.stack)
    while frames and frames[0].filename.startswith(_OWN_FRAMES):
        del frames[0]
    report.stack = traceback.StackSummary.from_list(frames)
    return ConfigError(f"the module {name} cannot be imported:\n{''.join(report.format()).rstrip()}")
