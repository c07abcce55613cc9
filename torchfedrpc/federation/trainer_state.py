"""State of a trainer's attributes: modules and optimisers as state dicts, other data by value; aliases are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from torchfedrpc.errors import ConfigError, SerializationError, SnapshotError
from torchfedrpc.host.state_comparison import Apart, first_difference
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import pack

KeyPath = tuple[Any, ...]  # name of an attribute, then keys and indices into its dicts and lists
Part = tuple[str, str]  # name of an attribute with a state dict, name of a module, parameter or buffer in it

_REMEDY = "keep it as an attribute of the trainer, or in a dict or list that is one, or define state_dict() yourself"


def has_state_dict(value: Any) -> bool:
    """Return whether an object has `state_dict` and `load_state_dict`."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def why_not_data(value: Any, trusted_modules: Iterable[str]) -> SerializationError | None:
    """Return why a value cannot be part of a state; None if it can.

    Args:
        value: The value.
        trusted_modules: Packages of classes allowed in the state.
    """
    try:
        pack(value, copy=False).open(AllowList(trusted_modules))
    except SerializationError as error:
        return error
    return None


def state_of(attributes: Mapping[str, Any], allow: AllowList, trainer: Any) -> dict[str, Any]:
    """Return the state of a trainer's attributes, for `give_state`.

    Args:
        attributes: The attributes to save, by name.
        allow: The allow-list for reading the state again.
        trainer: The trainer, for error messages.

    Returns:
        ``states`` (state dicts by name), ``values`` (data by name) and ``links``: paths in the values, or
        attributes, that refer to parts of an attribute with a state dict.

    Raises:
        SnapshotError: If the values would not be restored equal, or would no longer refer to parts of a module.
    """
    stateful = {name: value for name, value in attributes.items() if has_state_dict(value)}
    parts = _parts_of(stateful)
    links: list[tuple[KeyPath, Part]] = []
    for name, value in stateful.items():
        if (part := parts[id(value)]) != (name, ""):
            links.append(((name,), part))
    linked = {path[0] for path, _ in links}
    states = {name: value.state_dict() for name, value in stateful.items() if name not in linked}
    live = {name: value for name, value in attributes.items() if name not in stateful}
    values = _without_parts(live, parts, links)
    _check(live, values, links, stateful, allow, trainer)
    return {"states": states, "values": values, "links": links}


def give_state(trainer: Any, state: Mapping[str, Any]) -> None:
    """Restore the state that `state_of` returned.

    Raises:
        MissingAttributeError: If the trainer lacks attributes with a state dict; all others are restored.
    """
    present: dict[str, Any] = {name: getattr(trainer, name, None) for name in state["states"]}
    missing = [name for name, attribute in present.items() if not has_state_dict(attribute)]
    for name, inner in state["states"].items():
        if name not in missing:
            present[name].load_state_dict(inner)
    values = state["values"]
    _set_parts(values, [link for link in state["links"] if link[1][0] not in missing], vars(trainer))
    for name, value in values.items():
        setattr(trainer, name, value)
    if missing:
        raise MissingAttributeError(
            f"{type(trainer).__qualname__}.{missing[0]} has a state in the checkpoint, and is "
            f"{present[missing[0]]!r} here: make it in __init__, or before the loop over self.rounds()"
        )


class MissingAttributeError(ConfigError):
    """A trainer lacks an attribute of its state, which its `train` may make before the loop."""


def _parts_of(stateful: Mapping[str, Any]) -> dict[int, Part]:
    """Return object id -> part, for the parts of all modules; of nested modules the largest one counts."""
    parts: dict[int, Part] = {}
    modules = {name: value for name, value in stateful.items() if isinstance(value, nn.Module)}
    for name in sorted(modules, key=lambda name: -sum(1 for _ in modules[name].modules())):
        module = modules[name]
        for kind in (module.named_modules, module.named_parameters, module.named_buffers):
            for inner, part in kind():
                parts.setdefault(id(part), (name, inner))
    for name, value in stateful.items():
        parts.setdefault(id(value), (name, ""))
    return parts


def _part(attributes: Mapping[str, Any], part: Part) -> Any:
    name, inner = part
    found = attributes[name]
    for step in inner.split(".") if inner else ():
        found = getattr(found, step)
    return found


def _without_parts(values: dict[str, Any], parts: Mapping[int, Part], links: list[tuple[KeyPath, Part]]) -> Any:
    """Replace parts in dicts and lists by None; containers with parts are copied, others are kept."""
    copies: dict[int, Any] = {}

    def visit(value: Any, path: KeyPath) -> Any:
        if id(value) in parts:
            links.append((path, parts[id(value)]))
            return None
        if type(value) not in (dict, list) or id(value) in copies:
            return copies.get(id(value), value)
        copies[id(value)] = value  # set before its items, since it may contain itself
        items = value.items() if type(value) is dict else enumerate(value)
        found = {key: inner for key, item in items if (inner := visit(item, (*path, key))) is not item}
        if found:
            copies[id(value)] = copy = value.copy()
            for key, inner in found.items():
                copy[key] = inner
        return copies[id(value)]

    return visit(values, ())


def _set_parts(values: Any, links: list[tuple[KeyPath, Part]], attributes: Mapping[str, Any]) -> None:
    for path, part in links:
        container = values
        for step in path[:-1]:
            container = container[step]
        container[path[-1]] = _part(attributes, part)


def _check(
    live: dict[str, Any],
    values: dict[str, Any],
    links: list[tuple[KeyPath, Part]],
    stateful: dict[str, Any],
    allow: AllowList,
    trainer: Any,
) -> None:
    rebuilt = pack(values, copy=False).open(allow)
    _set_parts(rebuilt, [link for link in links if link[0][0] in live], stateful)
    roots = {name: getattr(value, "saved", value) for name, value in stateful.items()}  # of a `PartState`
    apart = Apart("the trainer's attribute", roots, _REMEDY)
    if (found := first_difference(live, rebuilt, owner=trainer, apart=[apart], are_attributes=True)) is not None:
        raise SnapshotError(
            f"the state of {type(trainer).__qualname__} cannot be saved because of {found.attribute.strip('.')!r}: "
            f"{found}; name it in not_state if a run need not have it to go on, else define state_dict() and "
            f"load_state_dict()"
        )
