"""Data sets that are loaded once: for all jobs of a sweep in their driver, and for all workers that it forks."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from torchfedrpc.experiments.data.samples import TrainTest
from torchfedrpc.experiments.recipe import build
from torchfedrpc.rpc.surroundings import Preload

_loaded: dict[str, Any] = {}  # the last one alone, by its recipe
_keeps = False


def load_dataset(recipe: Mapping[str, Any], trusted_modules: Iterable[str] = ()) -> Any:
    """Return the data set of a recipe. The caller may change it.

    Nothing is loaded if this process was forked from one that has loaded it, or if the job before in a block of
    `keeping_datasets` has.

    Args:
        recipe: Recipe of the data set.
        trusted_modules: Packages that the recipe may name, as in `build`.

    Raises:
        ConfigError: As in `build`.
    """
    key = _key(recipe)
    if key not in _loaded:
        made = build(recipe, trusted_modules)
        if not _keeps or type(made) is not TrainTest:  # another type may not be what its copy is
            return made
        _keep(key, made)
    return copy.deepcopy(_loaded[key]) if _keeps else _loaded.pop(key)


@contextmanager
def keeping_datasets() -> Iterator[None]:
    """Keep the data set that was loaded last in the block, for the next job in it."""
    global _keeps
    before, _keeps = _keeps, True
    try:
        yield
    finally:
        _keeps = before
        if not before:
            _loaded.clear()


def preload_of(recipe: Mapping[str, Any], trusted_modules: Iterable[str] = ()) -> Preload:
    """Return the call of `preload` for worker processes. Data sets of one function share a process."""
    kwargs = {"recipe": dict(recipe), "trusted_modules": list(trusted_modules)}
    return Preload(f"{__name__}:{preload.__name__}", kwargs, group=str(recipe.get("_target_")))


def preload(recipe: Mapping[str, Any], trusted_modules: Iterable[str]) -> bool:
    """Load a data set, and what the first step of an optimiser imports, in the process that forks the workers.

    Returns:
        Whether it was not there yet.

    Raises:
        RuntimeError: If loading has used a GPU, which no forked process could use then.
    """
    if _key(recipe) in _loaded:
        return False
    importlib.import_module("torch._dynamo")  # takes a second
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)  # threads of OpenMP would be missing in forked processes
        _keep(_key(recipe), build(recipe, trusted_modules))
    if torch.cuda.is_initialized():
        raise RuntimeError("a data set on a GPU is loaded by each worker")
    return True


def _keep(key: str, dataset: Any) -> None:
    _loaded.clear()
    _loaded[key] = dataset


def _key(recipe: Mapping[str, Any]) -> str:
    return json.dumps(recipe, sort_keys=True, default=repr)
