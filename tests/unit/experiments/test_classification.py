"""The bundled learner: its weights, its training, and what a process's learners share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.data.samples import TrainTest
from torchfedrpc.experiments.data.synthetic import synthetic
from torchfedrpc.experiments.experiment import _learner
from torchfedrpc.experiments.learners.classification import ClassificationLearner
from torchfedrpc.experiments.training import initial_weights
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.testing import check_snapshot, check_stateless
from torchfedrpc.testing.rehearsal import Step, rehearsal
from torchfedrpc.wire.packing import pack

DATASET = {"_target_": f"{__name__}.counted_dataset"}
RUNTIME = RuntimeConfig(execution_mode="local", trusted_modules=[__name__])
MODEL = {"_target_": "torchfedrpc.experiments.models.MLP"}
CLIENTS = ["client_1", "client_2", "client_3"]

_num_loads = 0


def counted_dataset() -> TrainTest:
    """A dataset that counts how often it is loaded."""
    global _num_loads
    _num_loads += 1
    return synthetic(num_samples=300)


def _with_proxy(use, *, seed: int = 0) -> Any:  # type: ignore[no-untyped-def]
    """Run ``await use(proxy)`` with three clients of 80 samples each in this process."""
    parts = np.array_split(np.arange(240), 3)
    clients = {
        client_id: {"dataset": DATASET, "indices": part, "model": MODEL, "seed": 7}
        for client_id, part in zip(CLIENTS, parts, strict=True)
    }

    async def main() -> Any:
        async with tfr.LearnerProxy("classification", clients, runtime=RUNTIME, seed=seed) as proxy:
            return await use(proxy)

    return asyncio.run(main())


def _is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_all_learners_begin_with_the_weights_of_their_seed() -> None:
    async def collect(proxy: tfr.LearnerProxy) -> Any:
        await proxy.train_epoch("client_1")
        return await proxy.get_model_weights("client_2"), await proxy.get_model_weights("client_3")

    for weights in _with_proxy(collect):
        assert _is_equal(weights, initial_weights(MODEL, seed=7))


def test_training_learns_and_stays_with_the_learner() -> None:
    async def train(proxy: tfr.LearnerProxy) -> Any:
        before = await proxy.evaluate("client_1")
        result = await proxy.train_epoch("client_1", local_epochs=10)
        own = await proxy.get_model_weights("client_1")
        return before, result, own, await proxy.evaluate("client_1"), await proxy.evaluate("client_2")

    before, result, own, after, others = _with_proxy(train)
    assert result["num_samples"] == before["num_samples"] == 80
    assert result["train_loss"] < before["loss"]
    assert _is_equal(result["model_weights"], own)
    assert after["accuracy"] > 0.9 > before["accuracy"]
    assert others["accuracy"] < 0.9  # the other learner is where it was


def test_training_begins_from_the_given_weights() -> None:
    async def train(proxy: tfr.LearnerProxy) -> Any:
        start = initial_weights(MODEL, seed=3)
        told = await proxy.train_epoch("client_1", model_weights=start, learning_rate=0.0)
        await proxy.set_model_weights("client_1", start)
        own = await proxy.train_epoch("client_1", learning_rate=0.0)
        return start, told["model_weights"], own["model_weights"]

    start, told, own = _with_proxy(train)
    assert _is_equal(told, start)
    assert _is_equal(own, start)


def test_weights_that_are_evaluated_are_not_kept() -> None:
    async def evaluate(proxy: tfr.LearnerProxy) -> Any:
        own = await proxy.get_model_weights("client_1")
        zeros = {name: torch.zeros_like(value) for name, value in own.items()}
        scored = await proxy.evaluate("client_1", model_weights=zeros)
        return own, scored, await proxy.get_model_weights("client_1")

    own, scored, later = _with_proxy(evaluate)
    assert scored["loss"] == pytest.approx(np.log(10))
    assert _is_equal(own, later)


def test_a_clients_result_does_not_depend_on_who_came_before() -> None:
    def train(order: Sequence[str]) -> Any:
        async def use(proxy: tfr.LearnerProxy) -> Any:
            return {client_id: await proxy.train_epoch(client_id, local_epochs=2) for client_id in order}

        return _with_proxy(use)

    forth, back = train(CLIENTS), train(CLIENTS[::-1])
    for client_id in CLIENTS:
        assert _is_equal(forth[client_id]["model_weights"], back[client_id]["model_weights"])
        assert forth[client_id]["train_loss"] == back[client_id]["train_loss"]


def test_the_dataset_is_loaded_once_for_all_learners() -> None:
    async def train(proxy: tfr.LearnerProxy) -> Any:
        before = _num_loads
        await proxy.clients().train_epoch()
        await proxy.clients().evaluate()
        return _num_loads - before

    assert _with_proxy(train) == 1


def test_weights_of_another_model_are_refused_and_the_next_call_works() -> None:
    async def train(proxy: tfr.LearnerProxy) -> Any:
        with pytest.raises(RuntimeError, match="Missing key"):
            await proxy.train_epoch("client_1", model_weights={"w": torch.zeros(1)})
        return await proxy.train_epoch("client_1")

    assert _with_proxy(train)["num_samples"] == 80


def _one_clients_kwargs() -> dict[str, Any]:
    return {"dataset": DATASET, "indices": np.arange(80), "model": MODEL, "seed": 7, "momentum": 0.9}


def test_a_learners_snapshot_is_complete() -> None:
    start = initial_weights(MODEL, seed=3)
    calls = [
        "evaluate",
        ("train_epoch", {"local_epochs": 2, "proximal_mu": 0.1}),
        "get_model_weights",
        ("set_model_weights", (start,)),
        ("train_epoch", {"model_weights": start, "learning_rate": 0.05}),
        "train_epoch",
        "evaluate",
    ]
    check_snapshot(ClassificationLearner, calls, kwargs=_one_clients_kwargs(), trusted_modules=[__name__])


def test_a_learners_snapshot_holds_its_weights_and_no_data() -> None:
    spec, _ = LearnerSpec.of(ClassificationLearner, 0, RUNTIME)
    with rehearsal(spec, "client_1", pack(_one_clients_kwargs())) as run:
        run.call(Step("evaluate"))
        assert len(run.snapshot()) < 1000
        run.call(Step("train_epoch"))
        num_weights = sum(weight.numel() for weight in run.call(Step("get_model_weights")).values())
        assert len(run.snapshot()) < 4 * num_weights + 2000


def test_a_learner_without_weights_of_its_own_says_how_to_have_them() -> None:
    client = {"dataset": DATASET, "indices": np.arange(80), "model": MODEL, "seed": 7, "keep_weights": False}

    async def main() -> None:
        async with tfr.LearnerProxy("classification", {"a": client}, runtime=RUNTIME) as proxy:
            first = (await proxy.train_epoch("a", model_weights=initial_weights(MODEL, seed=7)))["model_weights"]
            remedy = r"give them with each call, as train_epoch\(model_weights=\.\.\.\).*learner\.keep_weights=true"
            for method, args in {
                "get_model_weights": (),
                "set_model_weights": (first,),
                "train_epoch": (),
                "evaluate": (),
            }.items():
                with pytest.raises(ConfigError, match=remedy):
                    await proxy.custom_method("a", method, *args)

    asyncio.run(main())


def test_the_bundled_learner_without_weights_of_its_own_is_stateless() -> None:
    kwargs: dict[str, Any] = {"dataset": DATASET, "indices": np.arange(80), "model": MODEL, "momentum": 0.9}
    with pytest.raises(ConfigError, match="keep_weights is True or False, not 'false'"):
        ClassificationLearner("client_1", **kwargs, keep_weights="false")  # type: ignore[arg-type]
    kwargs["keep_weights"] = False
    weights = {"model_weights": initial_weights(MODEL, seed=3)}
    calls = [("train_epoch", weights), ("evaluate", weights)]
    check_stateless(ClassificationLearner, calls, kwargs=kwargs, trusted_modules=[__name__])
    kwargs["keep_weights"] = True
    with pytest.raises(ConfigError, match="'_weights'"):
        check_stateless(ClassificationLearner, [*calls, "evaluate"], kwargs=kwargs, trusted_modules=[__name__])


class WithCount(ClassificationLearner):
    num_calls = 0


@pytest.mark.parametrize(
    ("cls", "keeps_weights", "is_stateless"),
    [(ClassificationLearner, False, True), (ClassificationLearner, True, False), (WithCount, False, False)],
)
def test_an_experiment_declares_only_the_bundled_learner_stateless(
    cls: type, keeps_weights: bool, is_stateless: bool
) -> None:
    recipe = {"_target_": f"{cls.__module__}.{cls.__name__}", "keep_weights": keeps_weights}
    spec, _ = LearnerSpec.of(_learner(recipe), 0, RuntimeConfig())
    assert spec.stateless is is_stateless


def test_users_learner_need_not_be_complete_unless_it_derives() -> None:
    class Half(tfr.Learner):
        def train_epoch(self) -> None: ...

    with pytest.raises(TypeError, match="abstract"):
        Half("client_1")  # type: ignore[abstract]


def test_the_bundled_learner_is_registered() -> None:
    assert tfr.get_learner("classification") is ClassificationLearner


def test_a_client_that_diverges_is_named_and_keeps_its_weights() -> None:
    async def train(proxy: tfr.LearnerProxy) -> Any:
        with pytest.raises(
            FloatingPointError, match=r"client_1 has diverged: after \d+ steps .* lower learner\.learning_rate"
        ):
            await proxy.train_epoch("client_1", local_epochs=3, learning_rate=1e30)
        return await proxy.get_model_weights("client_1")

    assert _is_equal(_with_proxy(train), initial_weights(MODEL, seed=7))


def test_the_learning_rate_decays_with_the_rounds() -> None:
    clients = {"a": {"dataset": DATASET, "indices": np.arange(80), "model": MODEL, "learning_rate_decay": 0.5}}

    async def train(round_num: int, learning_rate: float) -> Any:
        async with tfr.LearnerProxy("classification", clients, runtime=RUNTIME) as proxy:
            result = await proxy.train_epoch("a", round_num=round_num, learning_rate=learning_rate)
            return result["model_weights"]

    assert _is_equal(asyncio.run(train(2, 0.4)), asyncio.run(train(0, 0.1)))
