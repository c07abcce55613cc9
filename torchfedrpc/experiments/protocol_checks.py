"""Checks that the parts of an experiment are as `protocols` says; messages name the kind and what is missing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from torchfedrpc.errors import ConfigError, suggest
from torchfedrpc.experiments.data.samples import Samples, TrainTest
from torchfedrpc.experiments.recipe import locate
from torchfedrpc.experiments.user_modules import KINDS
from torchfedrpc.federation.aggregation import Mean
from torchfedrpc.federation.cohort_trainer import CohortTrainer
from torchfedrpc.federation.trainer import AbstractFederationTrainer

Recipe = Mapping[str, Any]

GIVEN: dict[str, tuple[str, ...]] = {
    "trainer": ("initial_weights", "buffers", "score", "cohort", "simulation", "aggregator"),
    "learner": ("dataset", "indices", "held_out", "model", "seed"),
    "cohort": ("num_samples",),
    "partition": ("labels", "num_clients", "groups"),
}
"""Kind -> keyword arguments that the experiment gives, beside the settings."""

_TRAINER_SETTINGS = ("num_rounds", "clients_per_round", "local_epochs", "seed")  # of FedAvg's base class, and its own
_LEARNERS = {"ScaffoldTrainer": "scaffold", "FedBNTrainer": "fedbn", "DittoTrainer": "ditto"}
"""Trainer -> its learner, if that is not ``classification``."""

_REQUIRED = ("labels", "num_clients")  # arguments that each partition receives

_POSITIONAL: dict[str, tuple[str, ...]] = {
    "trainer": ("config", "learner_proxy"),
    "learner": ("client_id",),
    "cohort": ("trainer", "round_num", "clients", "size"),  # of a function, like
    "aggregator": ("models", "num_samples"),  # this; a class is called with its settings alone
}


def title(kind: str, recipe: Recipe) -> str:
    """Return what messages call the class or function of a recipe: its kind, and its registered or dotted name."""
    return f"{kind} {KINDS[kind].name_of(locate(recipe)) or recipe['_target_']}"


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe: all keys but ``_target_``."""
    return {key: value for key, value in recipe.items() if key != "_target_"}


def positional_of(kind: str, entry: Any) -> tuple[str, ...]:
    """Return the names of the positional arguments that the experiment gives a class or function."""
    return () if kind in ("cohort", "aggregator") and isinstance(entry, type) else _POSITIONAL.get(kind, ())


def given(kind: str, entry: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the experiment's keyword arguments that a class or function receives.

    A partition receives ``labels`` and ``num_clients``, and ``groups`` if its signature names them. The others
    receive those that their signature names, or all with ``**kwargs``.
    """
    named = set(inspect.signature(entry).parameters)
    if kind == "partition":
        named.update(_REQUIRED)
    elif any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(entry).parameters.values()):
        named.update(values)
    return {name: value for name, value in values.items() if name in named}


def check_signature(kind: str, recipe: Recipe) -> None:
    """Check that a class or function can be called with what the experiment gives it, and its settings.

    Raises:
        ConfigError: If it is not callable, lacks a method of its base class, lacks a parameter, or needs one more.
    """
    name, entry = title(kind, recipe), locate(recipe)
    if not callable(entry):
        raise ConfigError(f"{name}: a class or function is expected, not {entry!r:.200}")
    if missing := sorted(getattr(entry, "__abstractmethods__", ())):
        raise ConfigError(f"{name}: the class lacks {', '.join(missing)}, which its base class requires")
    keywords = dict.fromkeys(given(kind, entry, dict.fromkeys(GIVEN.get(kind, ()))))
    keywords |= {} if kind == "trainer" else settings_of(recipe)
    _check_call(name, entry, positional_of(kind, entry), keywords)


def check_trainer(recipe: Recipe) -> None:
    """Check the class of a trainer.

    Raises:
        ConfigError: If it is no `Trainer`.
    """
    name, entry = title("trainer", recipe), locate(recipe)
    if not (isinstance(entry, type) and issubclass(entry, AbstractFederationTrainer)):
        raise ConfigError(f"{name}: derive its class from tfr.FedAvgTrainer or tfr.AbstractFederationTrainer")
    if "train" in entry.__abstractmethods__:
        raise ConfigError(f"{name}: train is missing: write async def train(self), which returns the final weights")
    if not inspect.iscoroutinefunction(entry.train):
        raise ConfigError(f"{name}: train is not async: write async def train(self)")
    check_signature("trainer", recipe)
    if entry.__module__.split(".")[0] == __package__.split(".")[0]:  # one of the user's own may read any setting
        known = {*_TRAINER_SETTINGS, *entry.all_settings()}
        if odd := [key for key in settings_of(recipe) if key not in known]:
            raise ConfigError(f"{name} has no setting {odd[0]!r}{suggest(odd[0], known)}, and would ignore it")


def check_methods(recipe: Recipe, trainer: Any) -> None:
    """Check that a bundled trainer can call the learners.

    Raises:
        ConfigError: If their class is no `TrainsEpochs`.
    """
    name, entry = title("learner", recipe), locate(recipe)
    if not isinstance(entry, type) or not isinstance(trainer, CohortTrainer):
        return
    train_epoch = getattr(entry, "train_epoch", None)
    if not callable(train_epoch):
        near = suggest("train_epoch", [name for name in dir(entry) if not name.startswith("_")])
        raise ConfigError(f"{name}: the method train_epoch is missing, which the trainer calls{near}")
    if type(trainer).train_round is CohortTrainer.train_round:
        keywords = dict.fromkeys(["model_weights", "round_num", *trainer.local_settings()])
        kinds = [kind.__name__ for kind in type(trainer).__mro__]
        bundled = next((learner for kind, learner in _LEARNERS.items() if kind in kinds), "classification")
        hint = f"; the bundled learner for this trainer is learner={bundled}"
        _check_call(f"{name}: train_epoch", train_epoch, ("self",), keywords, hint)


def check_held_out(recipe: Recipe) -> None:
    """Check that the learners receive the held-out samples.

    Raises:
        ConfigError: If their constructor does not name them.
    """
    if not given("learner", locate(recipe), {"held_out": None}):
        raise ConfigError(
            f"{title('learner', recipe)} takes no held_out, and would never see these samples: give its constructor "
            f"the keyword argument held_out, on which its evaluate scores, or set held_out=0"
        )


def check_evaluates(recipe: Recipe) -> None:
    """Check that learners can score models after rounds.

    Raises:
        ConfigError: If their class has no ``evaluate``.
    """
    entry = locate(recipe)
    if isinstance(entry, type) and not callable(getattr(entry, "evaluate", None)):
        near = suggest("evaluate", [name for name in dir(entry) if not name.startswith("_")])
        raise ConfigError(
            f"{title('learner', recipe)}: the method evaluate is missing, which evaluate_every calls{near}; let it "
            f"return accuracy, loss and num_samples"
        )


def check_aggregator(recipe: Recipe, trainer: Recipe) -> None:
    """Check the class or function of an aggregator, and that the trainer takes one.

    Raises:
        ConfigError: If it is no `Aggregator`, or the trainer would ignore it.
    """
    check_signature("aggregator", recipe)
    name, entry = title("aggregator", recipe), locate(recipe)
    if isinstance(entry, type) and not any("__call__" in vars(base) for base in entry.__mro__):
        raise ConfigError(f"{name}: __call__ is missing: write def __call__(self, models, num_samples)")
    if entry is not Mean:
        check_taken("aggregator", name, trainer)


def check_taken(kind: str, name: str, trainer: Recipe) -> None:
    """Check that the constructor of a trainer has the keyword argument for what is chosen.

    Raises:
        ConfigError: If it has not, and would ignore it.
    """
    if not given("trainer", locate(trainer), {kind: None}):
        raise ConfigError(
            f"{title('trainer', trainer)} takes no {kind}, and would ignore {name}: give its constructor the keyword "
            f"argument {kind}, or leave out {kind}="
        )


def _check_call(
    name: str, function: Any, positional: Sequence[str], keywords: Mapping[str, Any], hint: str = ""
) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind(*positional, **keywords)
    except TypeError as error:
        of_call = ", ".join([*positional, *(f"{keyword}=" for keyword in keywords)])
        raise ConfigError(f"{name}: {error}; it is called with ({of_call}), and has {signature}{hint}") from None


def check_dataset(recipe: Recipe, data: Any) -> None:
    """Check what a dataset's function returned.

    Raises:
        ConfigError: If it is no `TrainTest` of labelled samples.
    """
    name = title("dataset", recipe)
    if not isinstance(data, TrainTest):
        raise ConfigError(f"{name}: tfr.TrainTest(train, test) is expected, not a {type(data).__name__}")
    for part, samples in (("train", data.train), ("test", data.test)):
        if not isinstance(samples, Samples):
            raise ConfigError(
                f"{name}: {part}: tfr.Samples(inputs, labels) is expected, not a {type(samples).__name__}"
            )
        for field, tensor in (("inputs", samples.inputs), ("labels", samples.labels)):
            if not isinstance(tensor, Tensor):
                raise ConfigError(f"{name}: {part}.{field}: a tensor is expected, not a {type(tensor).__name__}")
        if samples.labels.dtype != torch.int64 or samples.labels.dim() != 1:
            found = f"{samples.labels.dtype} of shape {list(samples.labels.shape)}"
            raise ConfigError(f"{name}: {part}.labels: int64 of shape [num_samples] is expected, not {found}")
        if not 0 < len(samples.labels) == len(samples.inputs):
            found = f"{len(samples.inputs)} inputs and {len(samples.labels)} labels"
            raise ConfigError(f"{name}: {part}: a label for each input is expected, and at least one; it has {found}")
        if samples.labels.min() < 0:
            least = int(samples.labels.min())
            raise ConfigError(f"{name}: {part}.labels: classes are numbered from 0, and it has {least}")
        if samples.groups is not None:
            _check_groups(f"{name}: {part}.groups", samples.groups, len(samples.labels))


def _check_groups(name: str, groups: Any, num_samples: int) -> None:
    if not isinstance(groups, Tensor):
        raise ConfigError(f"{name}: a tensor is expected, not a {type(groups).__name__}")
    if groups.dtype != torch.int64 or groups.shape != (num_samples,):
        found = f"{groups.dtype} of shape {list(groups.shape)}"
        raise ConfigError(f"{name}: int64 of shape [{num_samples}], one for each sample, is expected, not {found}")
    if groups.min() < 0:
        raise ConfigError(f"{name}: numbers from 0 are expected, and it has {groups.min()}")


def check_partition(recipe: Recipe, parts: Any, num_clients: int, num_samples: int) -> list[npt.NDArray[np.int64]]:
    """Check what a partition's function returned.

    Returns:
        The parts, as int64 arrays.

    Raises:
        ConfigError: If it is not an array of valid indices, and at least one, for each client.
    """
    name = title("partition", recipe)
    if not isinstance(parts, Sequence):
        raise ConfigError(f"{name}: a list of index arrays is expected, not a {type(parts).__name__}")
    if len(parts) != num_clients:
        raise ConfigError(f"{name}: it returned {len(parts)} parts for {num_clients} clients: return one for each")
    checked = []
    for client, part in enumerate(parts):
        indices = np.asarray(part)
        if indices.ndim != 1 or (indices.size and not np.issubdtype(indices.dtype, np.integer)):
            found = f"{indices.dtype} of shape {list(indices.shape)}"
            raise ConfigError(
                f"{name}: part {client}: whole numbers of shape [num_samples] are expected, not {found}"
            )
        if not indices.size:
            raise ConfigError(
                f"{name}: part {client} has no samples: give each client at least one, or have fewer clients, by "
                f"runtime.num_clients"
            )
        if not 0 <= indices.min() <= indices.max() < num_samples:
            found = f"{indices.min()} to {indices.max()}"
            raise ConfigError(
                f"{name}: part {client}: indices from 0 to {num_samples - 1} are expected, and it has {found}"
            )
        checked.append(indices.astype(np.int64))
    return checked


def unheld_classes(
    parts: Sequence[npt.NDArray[np.int64]], labels: npt.NDArray[np.int64], test_labels: npt.NDArray[np.int64]
) -> str | None:
    """Return a line about classes of the test set that no client can learn; None if there are none.

    It is no error: a small share of a data set with rare classes may be so, and a partition may mean it so.

    Args:
        parts: Indices of the samples of each client.
        labels: [num_samples]; the classes of the training set.
        test_labels: [num_samples]; the classes of the test set.
    """
    unheld = np.setdiff1d(test_labels, labels[np.concatenate(parts)])
    if not len(unheld):
        return None
    num_lost = int(np.isin(test_labels, unheld).sum())
    listed = ", ".join(map(str, unheld[:5].tolist())) + (", ..." if len(unheld) > 5 else "")
    return (
        f"no client has samples of {'class' if len(unheld) == 1 else 'classes'} {listed}, which {num_lost} of "
        f"{len(test_labels)} test samples have: the test accuracy is at most {1 - num_lost / len(test_labels):.3f}"
    )


def shared_samples(parts: Sequence[npt.NDArray[np.int64]]) -> str | None:
    """Return a line about samples that a partition gives to several clients; None if there are none."""
    indices = np.concatenate(parts)
    num_samples = len(np.unique(indices))
    if num_samples == len(indices):
        return None
    return f"{num_samples} samples are given to clients {len(indices)} times: some are of several clients"


def check_model(recipe: Recipe, dataset: Recipe, model: nn.Module, data: TrainTest) -> None:
    """Check that a model takes the inputs of the data, and returns logits for its classes.

    Raises:
        ConfigError: If it does not.
    """
    name = title("model", recipe)
    of_data = title("dataset", dataset)
    inputs = data.test.inputs[:2]
    num_classes = 1 + int(max(data.train.labels.max(), data.test.labels.max()))
    was_training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(inputs)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{name}: it does not take the inputs of {of_data}, {inputs.dtype} of shape "
            f"{['batch', *inputs.shape[1:]]!s}{_settings(recipe)}: {error}".replace("'", "")
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(inputs):
        found = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ConfigError(f"{name}: logits of shape [batch, num_classes] are expected, not {found}")
    if logits.shape[1] < num_classes:
        first = int(min(data.train.labels.min(), data.test.labels.min()))
        hint = f"; its labels are {first} to {num_classes - 1}: number the classes from 0" if first else ""
        raise ConfigError(
            f"{name}: {of_data} has {num_classes} classes, and it returns {logits.shape[1]} logits"
            f"{_settings(recipe)}{hint}"
        )


def _settings(recipe: Recipe) -> str:
    names = ", ".join(f"model.{name}" for name in recipe if not name.startswith("_"))
    return f" (to fit: {names})" if names else ""


def check_initial_weights(recipe: Recipe, trainer: Any) -> None:
    """Check that a subclass of `CohortTrainer` begins with the experiment's model.

    Raises:
        ConfigError: If its constructor keeps the initial weights from its base class.
    """
    if isinstance(trainer, CohortTrainer) and trainer.weights is None:
        raise ConfigError(
            f"{title('trainer', recipe)}: it has no initial weights: let its constructor take **kwargs and pass "
            f"them on, super().__init__(config, learner_proxy, **kwargs)"
        )


def check_final_weights(recipe: Recipe, weights: Any, model: nn.Module) -> None:
    """Check what a trainer's ``train`` returned.

    Raises:
        ConfigError: If it is no state dict of the model.
    """
    name = title("trainer", recipe)
    if not isinstance(weights, Mapping):
        raise ConfigError(
            f"{name}: train() must return the final weights, a state dict; it returned a {type(weights).__name__}"
        )
    if odd := sorted(weights.keys() ^ model.state_dict().keys()):
        raise ConfigError(
            f"{name}: train() returned weights that are not those of the model: only one of them has "
            f"{', '.join(map(str, odd[:5]))}"
        )
