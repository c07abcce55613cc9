"""The usual methods of a learner. Any class can be one; this base says what the others expect of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar


class Learner(ABC):
    """One client: its data, its model, its state. A base class for those who like one; nothing asks for it.

    A learner is made where it lives, as ``learner(client_id, **kwargs)``, and stays there. Every public
    method can be called from a trainer; it may be sync, async or a generator. Inside,
    ``tfr.current_call()`` tells the client, the device and whether the caller still wants the result.

    Between two calls a learner may move to another process: when its worker is lost, and in ``proxy.snapshots`` and
    ``proxy.restore``. It is then made anew by its constructor, and given its state back:

    - where its class has both ``state_dict()`` and ``load_state_dict(state)``, what these carry. They must be plain
      methods, and complete: every value that a call leaves behind and a later one depends on (weights, an optimiser's
      moments, counters, control variates). What the constructor makes anew, as a dataset, stays out.
    - else all its attributes, gradients included, but those that ``not_state`` names: the constructor makes these
      anew. ``__getstate__`` and ``__setstate__`` are heeded where the class has them.

    What would not come back equal is refused, and the learner stays where it is: locks, open files, lambdas and
    running generators, which ``not_state`` may name; autograd graphs, hooks on tensors, references to the learner
    itself, and marks that code knows by identity (``x is UNSET``). Types outside the learner's own package and
    ``runtime.trusted_modules`` cannot be restored either. What lies outside the learner is no state: variables of a
    module, class attributes, caches. The random streams of calls need no care, they are seeded by the call.
    ``torchfedrpc.testing.check_snapshot`` proves by replay that nothing is missing.

    After a loss, the calls since the last snapshot are made again, on equal arguments and random streams, so that a
    run ends with the bits of an undisturbed one. A learner that cannot be captured works all the same, until it has
    had more calls than the journal may hold; its loss is then `WorkerLostError`.

    Args:
        client_id: the client that this learner is.

    Attributes:
        not_state: names of attributes that are no state, such as ``{"loader"}``. The constructor makes them, and
            nothing else of the state may refer to them. A method that ``functools.lru_cache`` wraps may be named too.
            It says nothing where ``state_dict()`` says what is state.
    """

    not_state: ClassVar[Collection[str]] = frozenset()

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id

    @abstractmethod
    def train_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Train on the client's data.

        The bundled trainers pass ``model_weights``, ``round_num`` and ``local_epochs`` by keyword, and
        expect a mapping with ``model_weights`` (a state dict), ``num_samples`` (its weight in the mean) and
        ``train_loss``.
        """

    @abstractmethod
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Score a model on the client's data: a mapping with ``accuracy``, ``loss`` and ``num_samples``."""

    @abstractmethod
    def get_model_weights(self) -> Any:
        """The learner's own weights, as a state dict."""

    @abstractmethod
    def set_model_weights(self, weights: Any) -> Any:
        """Take ``weights``, a state dict, as the learner's own."""
