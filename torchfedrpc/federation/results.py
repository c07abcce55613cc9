"""What a trainer makes of the results of ``train_epoch``: checks, averages of their entries, and robust aggregates.

A result is a mapping with ``model_weights``, ``num_samples``, and the entries that an algorithm averages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.aggregation import Aggregator, Mean, StateDict, check_match, has_reducer
from torchfedrpc.federation.robust import RobustAggregator
from torchfedrpc.reduce.reducers import Mean as UniformMean
from torchfedrpc.reduce.reducers import Reducer, WeightedMean

Result = Mapping[str, Any]
ClientResult = tuple[str, Result]
"""A client and its result."""


def reducer_of(aggregator: Aggregator, averaged: Sequence[str], *, is_uniform: bool) -> Reducer | None:
    """Return what forms the aggregate of results on the workers; None if the driver needs all of them.

    Args:
        aggregator: The aggregator.
        averaged: Names of further entries that are averaged.
        is_uniform: Whether all clients count alike.
    """
    kind: type = type(aggregator)
    if kind is Mean:
        return _mean(("model_weights", *averaged), is_uniform)
    if has_reducer(aggregator) and not is_uniform and tuple(averaged) == ("train_loss",):
        return aggregator.reducer()
    return None


def parts_of(value: Any, aggregator: Aggregator) -> tuple[StateDict, dict[str, Any]]:
    """Return the aggregate, and the averages by name, of the value of an aggregator's reducer.

    Raises:
        ConfigError: If it has no ``model_weights``.
    """
    if not isinstance(value, Mapping) or "model_weights" not in value:
        raise ConfigError(
            f"the reducer of the aggregator {aggregator!r} made a {type(value).__name__}: it must make a mapping "
            f"with model_weights"
        )
    return value["model_weights"], {name: item for name, item in value.items() if name != "model_weights"}


def check_alike(results: Sequence[ClientResult], weights: StateDict | None) -> None:
    """Check that the models of clients have the names, shapes and kinds of dtype of the global weights.

    Args:
        results: Clients and their results.
        weights: The global weights. None: The first model.

    Raises:
        ValueError: If one differs; it names the client and the first difference.
    """
    first_client, first = results[0]
    expected = first["model_weights"] if weights is None else weights
    title_of_first = f"that of {first_client}" if weights is None else "the global model"
    for index, (client_id, result) in enumerate(results):
        check_match(expected, result["model_weights"], index, (f"the model of {client_id}", title_of_first))


def not_finite(results: Sequence[ClientResult]) -> dict[str, str]:
    """Return client -> name of an entry of its model that is not finite."""
    odd: dict[str, str] = {}
    for client_id, result in results:
        for name, value in result["model_weights"].items():
            if not value.isfinite().all():
                odd.setdefault(client_id, name)
    return odd


def averages_of(results: Sequence[Result], averaged: Sequence[str], *, is_uniform: bool) -> dict[str, Any]:
    """Return the means of further entries, by name; empty if all clients have no samples."""
    reducer = _mean(tuple(averaged), is_uniform)
    for result in results:
        reducer.add(result)
    return {} if reducer.is_empty else dict(reducer.finish())


def steering_names(result: Result, averaged: Sequence[str]) -> list[str]:
    """Return the names of averaged entries which steer an algorithm: all but the loss that are tensors or numbers.

    Entries of other kinds, such as lists, are averaged as without a robust aggregator.
    """
    names = [name for name in averaged if name != "train_loss"]
    return [name for name in names if all(map(_is_number, _items(result[name])))]


def robust_parts_of(
    results: Sequence[Result], steering: Sequence[str], aggregator: RobustAggregator
) -> tuple[StateDict, dict[str, Any]]:
    """Return the aggregate, and that of the further entries which steer an algorithm, by name.

    Args:
        results: The results.
        steering: Names of these entries: numbers, or mappings of tensors.
        aggregator: The aggregator.
    """
    models = [result["model_weights"] for result in results]
    aggregate, flat = aggregator.aggregate(models, [_flat({name: one[name] for name in steering}) for one in results])
    parts: dict[str, Any] = {}
    for name in steering:
        value = results[0][name]
        if isinstance(value, Mapping):
            parts[name] = {key: flat[f"{name}.{key}"] for key in value}
        else:
            parts[name] = flat[name] if isinstance(value, Tensor) else flat[name].item()
    return aggregate, parts


def _mean(names: tuple[str, ...], is_uniform: bool) -> UniformMean | WeightedMean:
    return UniformMean(names) if is_uniform else WeightedMean(names)


def _flat(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of mappings, and numbers as tensors, by name."""
    flat: dict[str, Tensor] = {}
    for name, value in entries.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": _tensor(item) for key, item in value.items()}
        else:
            flat[name] = _tensor(value)
    return flat


def _items(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor | int | float)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
