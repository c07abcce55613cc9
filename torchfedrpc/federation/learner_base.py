"""Base class of learners with the usual methods. Any other class can be a learner as well."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar


class Learner(ABC):
    """Optional base class of learners. A learner has one client's data, model and state.

    The process that owns the client creates its learner, as ``learner(client_id, **kwargs)``. A trainer can call
    every public method, which may be sync, async or a generator. Inside a method ``tfr.current_call()`` returns the
    client, the device and whether the call was cancelled.

    Between two calls a learner may move to another process: after the loss of its worker, and in
    ``proxy.snapshots`` and ``proxy.restore``. It is then constructed again, and its state is restored:

    - If its class has both ``state_dict()`` and ``load_state_dict(state)``, from these. They must be plain methods,
      and complete: they carry every value that a call changes and a later call depends on (weights, an optimiser's
      moments, counters, control variates). Objects that the constructor creates, such as a dataset, stay out.
    - Otherwise from all its attributes, gradients included, except those in ``not_state``, which the constructor
      creates. ``__getstate__`` and ``__setstate__`` are used if the class has them.

    A state that would not be restored equal is refused, and the learner stays on its worker: locks, open files,
    lambdas and running generators, which ``not_state`` may name; autograd graphs, hooks on tensors, references to the
    learner, and sentinels compared by identity (``x is UNSET``). Types outside the learner's package and
    ``runtime.trusted_modules`` cannot be restored either. Variables of a module, class attributes and caches do not
    belong to the state. Random streams are seeded per call and need no state.
    ``torchfedrpc.testing.check_snapshot`` checks by replay that a state is complete.

    After a loss, the calls since the last snapshot are replayed with equal arguments and random streams, so that a
    run ends with the bits of an undisturbed one. A learner that cannot be captured still works. After more calls than
    the journal may hold, its loss raises `WorkerLostError`.

    Args:
        client_id: The client of this learner.

    Attributes:
        not_state: Names of attributes outside the state, such as ``{"loader"}``. The constructor creates them, and
            the state must not refer to them. A method wrapped by ``functools.lru_cache`` may be named too. It is
            ignored if ``state_dict()`` defines the state.
        stateless: Whether no call leaves anything in the learner that a later call needs; caches are fine. The calls
            of a stateless learner run on any worker, where a learner is made if there is none.
            ``torchfedrpc.testing.check_stateless`` checks that by replay.
    """

    not_state: ClassVar[Collection[str]] = frozenset()
    stateless: ClassVar[bool] = False

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id

    @abstractmethod
    def train_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Train on the client's data.

        The bundled trainers pass ``model_weights``, ``round_num`` and ``local_epochs`` by keyword. They expect a
        mapping with ``model_weights`` (a state dict), ``num_samples`` (its weight in the mean) and ``train_loss``.
        """

    @abstractmethod
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Score a model on the client's data; return a mapping with ``accuracy``, ``loss`` and ``num_samples``."""

    @abstractmethod
    def get_model_weights(self) -> Any:
        """Return the learner's weights, a state dict."""

    @abstractmethod
    def set_model_weights(self, weights: Any) -> Any:
        """Set the learner's weights to ``weights``, a state dict."""
