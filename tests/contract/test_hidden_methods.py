"""Methods of a learner whose names a handle or a group has itself."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from learners import Probe, Shadowed, shadowed

import torchfedrpc as tfr

TEXT = (
    r"the learner Shadowed has methods whose names are taken by proxy\.client\(\.\.\.\) \(options\) and "
    r"proxy\.clients\(\.\.\.\) \(options, reduce\): .*"
    r"proxy\.execute_remote_method\(client_id, 'options'\) or group\.call\('options'\)"
)


async def test_a_class_with_hidden_methods_is_warned_of_and_they_are_called_by_name(
    lone_runtime: dict[str, Any],
) -> None:
    with pytest.warns(UserWarning, match=TEXT) as warned:
        proxy = tfr.LearnerProxy(Shadowed, ["a", "b"], runtime=lone_runtime)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    async with proxy:
        assert await proxy.execute_remote_method("a", "options") == "its options"
        assert dict(await proxy.clients().call("reduce")) == {"a": "its reduce", "b": "its reduce"}
        assert await proxy.client("a").reduce() == "its reduce"
        assert await proxy.client("a").train_epoch() == "trained"


async def test_a_factory_with_hidden_methods_is_warned_of_once_at_its_first_call(
    lone_runtime: dict[str, Any], mode: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    if mode == "distributed":
        pytest.skip("what a rank logs goes to its launcher's output")
    async with tfr.LearnerProxy(shadowed, ["a", "b"], runtime=lone_runtime) as proxy:
        assert "Shadowed" not in caplog.text + capfd.readouterr().err
        assert await proxy.client("a").train_epoch() == "trained"
        assert await proxy.client("b").train_epoch() == "trained"
    logged = caplog.text
    assert logged.count("the learner Shadowed has methods whose names are taken by") == 1
    assert "group.call('options')" in logged


@pytest.mark.parametrize(
    "learner", [Probe, functools.partial(Probe), tfr.ClassificationLearner, "classification"], ids=str
)
def test_usual_learners_are_not_warned_of(learner: Callable[..., Any] | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tfr.LearnerProxy(learner, ["a"], runtime="local")


@pytest.mark.parametrize("owner", [tfr.LearnerHandle, tfr.LearnerGroup])
def test_every_public_name_of_a_handle_and_a_group_is_warned_of(owner: type, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {name for name in dir(owner) if not name.startswith("_")}
    taken |= {"client_id"} if owner is tfr.LearnerHandle else set()
    assert {"options"} < taken
    for name in taken:
        monkeypatch.setattr(Named, name, lambda self: None, raising=False)
        with pytest.warns(UserWarning, match=rf"the learner Named .*\(.*\b{name}\b.*\): call them"):
            tfr.LearnerProxy(Named, ["a"], runtime="local")
        monkeypatch.undo()


class Named:
    """A learner that gets one more method."""

    def __init__(self, client_id: str) -> None:
        pass
