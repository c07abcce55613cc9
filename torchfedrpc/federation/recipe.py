"""Recipes: plain mappings with a ``_target_`` that say how to make an object, wherever it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchfedrpc.errors import ConfigError


def build(recipe: Mapping[str, Any], /, **extra: Any) -> Any:
    """Call a recipe's target; what that raises is raised as it is.

    Args:
        recipe: ``_target_`` is the dotted name of a class or function, the other keys are its arguments.
        extra: further arguments, which stay out of hydra's hands and so may be anything.

    Raises:
        ConfigError: the recipe has no target, or one that cannot be found.
    """
    # Here, because workers import this module with their learner, and hydra costs a tenth of a second.
    from hydra.errors import HydraException  # noqa: PLC0415
    from hydra.utils import instantiate  # noqa: PLC0415

    _check_target(recipe)
    try:
        make = instantiate(dict(recipe), _partial_=True, _convert_="all")
    except HydraException as error:
        raise ConfigError(f"cannot use {dict(recipe)}: {error}") from error
    return make(**extra)


def locate(recipe: Mapping[str, Any], /) -> Any:
    """The class or function that a recipe names.

    Raises:
        ConfigError: the recipe has no target, or one that cannot be found.
    """
    from hydra.utils import get_object  # noqa: PLC0415 - as above

    _check_target(recipe)
    try:
        return get_object(recipe["_target_"])
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot find {recipe['_target_']!r}: {error}") from error


def _check_target(recipe: Mapping[str, Any]) -> None:
    if not isinstance(recipe.get("_target_"), str):
        raise ConfigError(f"a recipe needs _target_, the dotted name of what makes it; this has none: {dict(recipe)}")
