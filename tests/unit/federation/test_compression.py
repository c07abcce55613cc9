"""Codecs of updates: their error bounds, what is exact, and what they refuse; and trainers with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.training import build_model, copy_weights
from torchfedrpc.federation.compression import CODECS, decode, encode, tensor_bytes

DATASET = {"_target_": "torchfedrpc.experiments.data.synthetic.synthetic", "num_samples": 120}
MODEL = {"_target_": "torchfedrpc.experiments.models.ConvNet", "channels": [2, 3], "batch_norm": True}

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
CHANGES = arrays(np.float32, st.integers(0, 40), elements=FLOATS).map(torch.from_numpy)


def state(*values: Tensor) -> dict[str, Tensor]:
    return {f"w{number}": value for number, value in enumerate(values)}


def sent(change: dict[str, Tensor], codec: str, **given: Any) -> tuple[dict[str, Tensor], Any]:
    """What the driver makes of a change from zeros, and the residual."""
    zeros = {name: torch.zeros_like(value) for name, value in change.items()}
    update, residual = encode(change, zeros, change, codec, **given)
    found = decode(update, zeros, codec)
    assert all(torch.equal(change[name] - found[name], residual[name]) for name in change)
    return found, residual


@settings(deadline=None)
@given(CHANGES)
def test_bf16_keeps_each_value_within_a_256th(change: Tensor) -> None:
    _, residual = sent(state(change), "bf16")
    assert (residual["w0"].abs() <= change.abs() * 2.0**-8).all()


@settings(deadline=None)
@given(CHANGES, CHANGES)
def test_int8_keeps_each_value_within_half_a_step_of_its_tensor(first: Tensor, second: Tensor) -> None:
    _, residual = sent(state(first, second), "int8")
    for change, rest in zip((first, second), residual.values(), strict=True):
        most = change.double().abs().max() if change.numel() else torch.zeros(())
        assert (rest.double().abs() <= most * (1 / 254 + 2.0**-24)).all()


@settings(deadline=None)
@given(CHANGES, CHANGES, st.floats(0.001, 1))
def test_top_k_keeps_the_largest_magnitudes_of_the_update(first: Tensor, second: Tensor, ratio: float) -> None:
    found, residual = sent(state(first, second), "top_k", ratio=ratio)
    flat, rest = torch.cat([first, second]).double(), torch.cat([*residual.values()]).double()
    kept = torch.cat([*found.values()]) != 0
    count = math.ceil(ratio * len(flat))
    assert int(kept.sum()) <= count
    assert not len(flat) or rest.square().sum() <= (1 - count / len(flat)) * flat.square().sum() * (1 + 1e-12)
    assert not kept.any() or kept.all() or flat[kept].abs().min() >= rest.abs().max()


def test_top_k_takes_the_first_of_equal_magnitudes() -> None:
    found, _ = sent(state(torch.tensor([1.0, -1.0, 1.0, -1.0])), "top_k", ratio=0.5)
    assert found["w0"].tolist() == [1.0, -1.0, 0.0, 0.0]


@settings(deadline=None)
@given(st.lists(arrays(np.float32, 6, elements=st.integers(-1000, 1000).map(float)), min_size=1, max_size=12))
def test_error_feedback_loses_nothing(changes: list[Any]) -> None:
    zeros = state(torch.zeros(6))
    residual: Any = {}
    total = torch.zeros(6)
    for change in changes:
        update, residual = encode(
            state(torch.from_numpy(change)), zeros, ["w0"], "top_k", ratio=0.3, residual=residual
        )
        total += decode(update, zeros, "top_k")["w0"]
    assert torch.equal(total + residual["w0"], torch.from_numpy(np.sum(changes, axis=0)))


@pytest.mark.parametrize("codec", CODECS)
def test_other_entries_than_trained_floats_are_exact(codec: str) -> None:
    weights = {
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "double": torch.full((2, 2), 1e-9, dtype=torch.float64),
        "running_var": torch.tensor([0.1234567]),
        "count": torch.tensor(2**40 + 1),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    received = {name: torch.zeros_like(value) for name, value in weights.items()}
    update, _ = encode(weights, received, {*weights} - {"running_var"}, codec)
    found = decode(update, received, codec)
    assert list(found) == list(weights)
    for name, value in found.items():
        assert (value.dtype, value.shape) == (weights[name].dtype, weights[name].shape), name
    for name in ("running_var", "count", "flags"):
        assert torch.equal(found[name], weights[name]), name
    torch.testing.assert_close(found["half"], weights["half"], rtol=0.01, atol=0.01)
    torch.testing.assert_close(found["double"], weights["double"], rtol=0.01, atol=0)


def test_updates_have_so_many_bytes() -> None:
    weights = state(torch.randn(1000), torch.randn(10, 10))
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    sizes = {codec: tensor_bytes(encode(weights, zeros, weights, codec, ratio=0.01)[0]) for codec in CODECS}
    assert sizes == {"bf16": 2200, "int8": 1100 + 2 * 8, "top_k": 11 * 8}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_changes_that_are_not_finite_are_refused(codec: str, value: float) -> None:
    with pytest.raises(FloatingPointError, match=f"the change of w1 is not finite, or too large for {codec}"):
        sent(state(torch.ones(2), torch.tensor([1.0, value])), codec)


def test_a_change_that_bf16_would_round_to_infinity_is_refused() -> None:
    with pytest.raises(FloatingPointError, match="too large for bf16"):
        sent(state(torch.tensor([torch.finfo(torch.float32).max])), "bf16")


@pytest.mark.parametrize("codec", CODECS)
def test_updates_of_wrong_clients_are_refused(codec: str) -> None:
    weights = state(torch.ones(2), torch.ones(3))
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    update, _ = encode(weights, zeros, weights, codec)
    odd: list[Any] = [None, {}, {"exact": {}, "change": {}}, {"exact": None, "change": None}]
    for wrong in odd:
        with pytest.raises(ValueError, match=f"an update is none of {codec}"):
            decode(wrong, zeros, codec)
    with pytest.raises(ValueError, match="an update has 'odd', which the weights lack"):
        decode({**update, "exact": {"odd": torch.ones(1)}}, zeros, codec)
    if codec == "top_k":
        code = {"indices": torch.tensor([1, 5]), "values": torch.ones(2)}
        with pytest.raises(ValueError, match="indices from 1 to 5 of 5 values"):
            decode({**update, "change": code}, zeros, codec)
    else:
        smaller, _ = encode(
            state(torch.ones(1), torch.ones(3)), state(torch.zeros(1), torch.zeros(3)), weights, codec
        )
        with pytest.raises(ValueError, match=r"entry 'w0' has in an update shape \[1\], and in the weights \[2\]"):
            decode(smaller, zeros, codec)
    if codec == "int8":
        codes = {name: {"steps": torch.ones(2), "scale": torch.ones(())} for name in weights}
        with pytest.raises(ValueError, match=r"steps of torch\.float32"):
            decode({**update, "change": codes}, zeros, codec)


# Trainers.

TRAINERS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "fedavg": (tfr.FedAvgTrainer, "classification", {}),
    "fedadam": (tfr.FedAdamTrainer, "classification", {}),
    "scaffold": (tfr.ScaffoldTrainer, "scaffold", {}),
    "fednova": (tfr.FedNovaTrainer, "classification", {}),
    "fedbn": (tfr.FedBNTrainer, "fedbn", {}),
    "ditto": (tfr.DittoTrainer, "ditto", {}),
    "fedbuff": (tfr.FedBuffTrainer, "classification", {"buffer_size": 2, "num_in_flight": 2}),
}


async def train(name: str, *, num_rounds: int = 2, learners: Any = None, **config: Any) -> Any:
    trainer, learner, own = TRAINERS[name]
    model = build_model(MODEL, 0)
    shares = np.split(np.arange(96), 3)
    common = {"dataset": DATASET, "model": MODEL, "momentum": 0.0, "learning_rate": 0.05}
    clients = {client: {**common, "indices": share} for client, share in zip("abc", shares, strict=True)}
    async with tfr.LearnerProxy(learners or learner, clients, runtime="local") as proxy:
        made = trainer(
            {"num_rounds": num_rounds, **own, **config},
            proxy,
            initial_weights=copy_weights(model),
            buffers=[buffer for buffer, _ in model.named_buffers()],
            simulation=tfr.SimulatedClients(spread=0.3) if name == "fedbuff" else None,
        )
        await made.train()
        return made


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", TRAINERS)
async def test_trainers_take_codecs_and_stay_near_uncompressed_training(name: str, codec: str) -> None:
    exact = await train(name)
    made = await train(name, compression=codec, compression_ratio=1.0)
    for key, value in exact.weights.items():
        torch.testing.assert_close(made.weights[key], value, rtol=0.05, atol=0.02, msg=key)
    metrics = made.history[-1].metrics
    least = {"bf16": 0.4, "int8": 0.2, "top_k": 1.0}[codec]
    assert metrics["update_bytes"] > least * metrics["uncompressed_bytes"] > 0
    assert (metrics["update_bytes"] < metrics["uncompressed_bytes"]) == (codec != "top_k")
    assert "update_bytes" not in exact.history[-1].metrics


async def test_learners_send_later_what_top_k_left_out() -> None:
    weights = copy_weights(build_model(MODEL, 0))
    clients = {"a": {"dataset": DATASET, "model": MODEL, "indices": np.arange(48)}}
    totals = []
    for ratios in ([None] * 3, [0.1, 0.1, 1.0]):
        total = torch.zeros_like(weights["head.weight"])
        async with tfr.LearnerProxy("classification", clients, runtime="local") as proxy:
            for ratio in ratios:
                options: Any = {} if ratio is None else {"compression": "top_k", "compression_ratio": ratio}
                result = await proxy.train_epoch("a", model_weights=weights, **options)
                model = decode(result["update"], weights, "top_k") if ratio else result["model_weights"]
                total += model["head.weight"] - weights["head.weight"]
        totals.append(total)
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"compression": "topk"}, r"compression is null, bf16, int8 or top_k, not 'topk' \(did you mean 'top_k'\?\)"),
        ({"compression": 8}, "compression is null, bf16, int8 or top_k, not 8"),
        ({"compression_ratio": 0}, "compression_ratio is above 0 and at most 1, not 0"),
        ({"compression_ratio": 1.5}, "compression_ratio is above 0 and at most 1, not 1.5"),
        ({"compression_ratio": math.nan}, "compression_ratio is above 0 and at most 1, not nan"),
        ({"compression_ratio": True}, "compression_ratio is above 0 and at most 1, not True"),
    ],
)
async def test_codecs_that_do_not_exist_and_ratios_out_of_range_are_refused(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        await train("fedavg", **config)


class Stateless(tfr.ClassificationLearner):
    """A learner that is declared stateless."""

    stateless = True


class Deaf(tfr.ClassificationLearner):
    """A learner that ignores the codec."""

    def train_epoch(self, *args: Any, compression: Any = None, **kwargs: Any) -> Any:
        return super().train_epoch(*args, **kwargs)


async def test_stateless_learners_would_lose_the_residual_of_top_k() -> None:
    with pytest.raises(ConfigError, match=r"these are stateless: set learner\.keep_weights=true, or .* to int8"):
        await train("fedavg", compression="top_k", learners=Stateless)


async def test_learners_that_do_not_compress_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the result of train_epoch of a has no update, although .* is int8"):
        await train("fedavg", compression="int8", learners=Deaf)


async def test_compression_needs_initial_weights() -> None:
    clients = {"a": {"dataset": DATASET, "model": MODEL, "indices": np.arange(8)}}
    async with tfr.LearnerProxy("classification", clients, runtime="local") as proxy:
        with pytest.raises(ConfigError, match="give it initial_weights="):
            tfr.FedAvgTrainer({"num_rounds": 1, "compression": "int8"}, proxy)
