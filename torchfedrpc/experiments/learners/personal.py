"""Learners with weights of their own beside the global ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torchfedrpc.experiments.learners.classification import ClassificationLearner
from torchfedrpc.federation.aggregation import StateDict


class PersonalLearner(ClassificationLearner):
    """Base class of learners whose state has personal weights: a whole model, or some of its entries.

    Args:
        client_id: The client of this learner.
        settings: As `ClassificationLearner`.
    """

    def __init__(self, client_id: str, **settings: Any) -> None:
        super().__init__(client_id, **settings)
        self._personal: StateDict | None = None

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Restore the learner's state if the block fails."""
        before = self.state_dict()
        try:
            yield
        except BaseException:
            self.load_state_dict(before)
            raise

    def get_personal_weights(self) -> StateDict | None:
        """Return the personal weights by name; None before the first training."""
        return self._personal

    def state_dict(self) -> dict[str, Any]:
        """Return the state for snapshots: that of `ClassificationLearner`, and the personal weights."""
        return {**super().state_dict(), "personal": self._personal}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        super().load_state_dict(state)
        self._personal = state["personal"]
