"""Methods of a learner that may be called: the public callables."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torchfedrpc.errors import MethodNotFoundError, suggest


def find_method(learner: Any, name: str, client_id: str) -> Callable[..., Any]:
    """Return a public method of a learner.

    Raises:
        MethodNotFoundError: If there is no such name, or it is private or not callable; near matches are named.
    """
    kind = type(learner).__name__
    if name.startswith("_"):
        raise MethodNotFoundError(
            f"{client_id}: {kind}.{name} is private; only public methods can be called"
            f"{suggest(name.lstrip('_'), public_methods(learner))}"
        )
    method = getattr(learner, name, None)
    if method is None and not hasattr(learner, name):
        raise MethodNotFoundError(
            f"{client_id}: {kind} has no method {name!r}{suggest(name, public_methods(learner))}"
        )
    if not callable(method):
        raise MethodNotFoundError(
            f"{client_id}: {kind}.{name} is no method but a {type(method).__name__}; add a method that returns it"
            f"{suggest(name, public_methods(learner))}"
        )
    found: Callable[..., Any] = method
    return found


def public_methods(learner: Any) -> list[str]:
    """Return the names of the public methods of an object or class, without evaluating properties."""
    entries = {name: inspect.getattr_static(learner, name, None) for name in dir(learner) if not name.startswith("_")}
    kinds = (classmethod, functools.partialmethod)  # callable once they are looked up
    return [name for name, entry in entries.items() if callable(entry) or isinstance(entry, kinds)]


def hidden_methods(learner: type, taken_names: Mapping[str, Collection[str]]) -> str | None:
    """Describe public methods of a learner that cannot be called as attributes of handles or groups.

    Args:
        learner: The learner's class.
        taken_names: Expression of a handle or group, for messages -> public names of its class.

    Returns:
        A warning that says how to call them; None if every method can be called as an attribute.
    """
    methods = public_methods(learner)
    hidden = {owner: sorted({*methods} & {*names}) for owner, names in taken_names.items()}
    if not any(hidden.values()):
        return None
    where = " and ".join(f"{owner} ({', '.join(names)})" for owner, names in hidden.items() if names)
    example = min(name for names in hidden.values() for name in names)
    return (
        f"the learner {learner.__qualname__} has methods whose names are taken by {where}: call them by their names, "
        f"proxy.execute_remote_method(client_id, {example!r}) or group.call({example!r}), or name them otherwise"
    )
