"""`check_learner`: a good learner passes in every mode, and learners that depend on a process are found."""

from __future__ import annotations

import importlib
import os
import random
from typing import Any

import pytest
import torch

from torchfedrpc.errors import ConfigError, SnapshotError
from torchfedrpc.testing import check_learner


class Good:
    """Keeps all of its state in attributes, and draws from the seeded streams."""

    def __init__(self, client_id: str, width: int = 2) -> None:
        self.client_id = client_id
        self.weights = torch.zeros(width)

    def train(self, lr: float = 0.1) -> dict[str, Any]:
        self.weights += lr * torch.randn_like(self.weights)
        return {"weights": self.weights.clone(), "pid": os.getpid()}

    def losses(self, count: int) -> Any:
        for _ in range(count):
            yield float(torch.rand(())) + random.random()

    def fail(self) -> None:
        raise ValueError(f"{self.client_id} has no data")


class Stateless:
    stateless = True

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id

    def double(self, value: float) -> float:
        return 2 * value


class TellsItsProcess(Good):
    def train(self, lr: float = 0.1) -> dict[str, Any]:
        return {"pid": os.getpid()}


class CountsInItsClass(Good):
    num_calls = 0

    def train(self, lr: float = 0.1) -> dict[str, Any]:
        type(self).num_calls += 1
        return {"num_calls": type(self).num_calls}


class HidesAnAttribute(Good):
    def __getstate__(self) -> dict[str, Any]:
        return {"client_id": self.client_id}


class ClaimsToBeStateless(Stateless):
    def double(self, value: float) -> float:
        self.sum = getattr(self, "sum", 0.0) + value
        return self.sum


CALLS = ["train", ("losses", (3,)), ("train", {"lr": 0.5})]


def test_a_good_learner_passes_and_its_results_are_returned() -> None:
    first, losses, second = check_learner(Good, CALLS, kwargs={"width": 3}, ignore=["pid"])
    assert first["client_1"]["weights"].shape == (3,)
    assert not torch.equal(first["client_1"]["weights"], second["client_1"]["weights"])
    assert len(losses["client_2"]) == 3


def test_a_stateless_learner_passes() -> None:
    assert check_learner(Stateless, [("double", (2.0,)), ("double", (3.0,))])[0]["client_1"] == 4.0


def test_exceptions_that_are_named_are_compared_and_returned() -> None:
    (failed,) = check_learner(Good, ["fail"], raises=ValueError, modes=["local", "pseudo"])
    assert failed["client_2"].args == ("client_2 has no data",)
    with pytest.raises(ValueError, match="client_1 has no data"):
        check_learner(Good, ["fail"], modes=["local"])


@pytest.mark.parametrize(
    ("learner", "calls", "error", "message"),
    [
        (
            TellsItsProcess,
            ["train"],
            ConfigError,
            r"differs between modes: call 1 \(train\) of client_1 gives .* at result\['pid'\]",
        ),
        (CountsInItsClass, ["train"], ConfigError, r"call 1 \(train\) of client_\d gives .* in pseudo mode"),
        (HidesAnAttribute, ["train", "train"], SnapshotError, "weights"),
        (ClaimsToBeStateless, [("double", (1.0,))] * 2, ConfigError, r"is not stateless.*'sum'"),
    ],
)
def test_a_bad_learner_is_named_with_the_call_and_the_difference(
    learner: type, calls: list[Any], error: type[Exception], message: str
) -> None:
    ignore = ["pid"] if learner is HidesAnAttribute else []
    with pytest.raises(error, match=message):
        check_learner(learner, calls, modes=["local", "pseudo"], ignore=ignore)


def test_a_learner_that_a_worker_elsewhere_cannot_import_or_run_is_found(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "depends_on_folder.py").write_text(
        "import os\n\n\nclass Reads:\n    stateless = True\n\n    def __init__(self, client_id):\n        pass\n\n"
        "    def read(self):\n        return os.environ.get('SET_BY_THE_TEST')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    depends_on_folder = importlib.import_module("depends_on_folder")
    with monkeypatch.context() as patch:
        patch.setattr(depends_on_folder.Reads, "read", lambda self: "patched")
        with pytest.raises(
            ConfigError, match=r"call 1 \(read\) of client_1 gives None in distributed mode and 'patched'"
        ):
            check_learner(depends_on_folder.Reads, ["read", "read"], modes=["local", "distributed"])


@pytest.mark.parametrize(
    ("calls", "options", "message"),
    [
        ([], {}, "at least one call"),
        ("train", {}, r"a list of calls: \['train'\]"),
        ([3], {}, "3 is no call"),
        (["train"], {"modes": ["remote"]}, "has the modes local, pseudo, distributed, not remote"),
        (["train"], {"modes": []}, "not none"),
    ],
)
def test_wrong_arguments_are_refused(calls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_learner(Good, calls, **options)


async def test_a_running_event_loop_is_refused() -> None:
    with pytest.raises(ConfigError, match="a test that is no coroutine"):
        check_learner(Good, ["train"])
