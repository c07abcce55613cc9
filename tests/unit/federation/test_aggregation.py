"""The mean of models: its numbers, its dtypes, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from torchfedrpc.federation.aggregation import weighted_mean
from torchfedrpc.reduce.reducers import WeightedMean
from torchfedrpc.reduce.tree import Forest, merged

FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def test_clients_count_alike_without_weights() -> None:
    mean = weighted_mean([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}])
    assert torch.equal(mean["w"], torch.tensor([2.0, 4.0]))


def test_clients_count_by_their_weights() -> None:
    mean = weighted_mean([{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}], [30, 10])
    assert torch.equal(mean["w"], torch.tensor([1.0]))


def test_equal_arguments_give_equal_bits() -> None:
    states = [{"w": torch.randn(1000)} for _ in range(7)]
    weights = [3, 1, 4, 1, 5, 9, 2]
    assert torch.equal(weighted_mean(states, weights)["w"], weighted_mean(states, weights)["w"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    mean = weighted_mean([{"w": torch.ones(3, dtype=dtype)}, {"w": torch.full((3,), 3, dtype=dtype)}])
    assert torch.equal(mean["w"], torch.full((3,), 2, dtype=dtype))


def test_small_floats_are_summed_in_float32() -> None:
    one = {"w": torch.ones(1, dtype=torch.bfloat16)}
    assert weighted_mean([one] * 1000)["w"].item() == 1.0  # a sum in bfloat16 stops growing at 256


def test_eight_bit_floats_are_averaged() -> None:
    states = [{"w": torch.tensor([value]).to(torch.float8_e4m3fn)} for value in (1.0, 3.0)]
    mean = weighted_mean(states)["w"]
    assert mean.dtype == torch.float8_e4m3fn
    assert mean.float().item() == 2.0


def test_integers_are_rounded_to_the_nearest() -> None:
    states = [{"num_batches_tracked": torch.tensor(count)} for count in (1, 2, 2)]
    mean = weighted_mean(states)["num_batches_tracked"]
    assert mean.dtype == torch.int64
    assert mean.item() == 2


def test_booleans_follow_the_majority_of_the_weight() -> None:
    states = [{"mask": torch.tensor([True, True])}, {"mask": torch.tensor([False, True])}]
    assert weighted_mean(states, [1, 2])["mask"].tolist() == [False, True]
    assert weighted_mean(states, [1, 1])["mask"].tolist() == [False, True]
    assert weighted_mean(states, [2, 1])["mask"].tolist() == [True, True]


def test_empty_and_scalar_tensors_are_averaged() -> None:
    mean = weighted_mean([{"none": torch.empty(0), "one": torch.tensor(1.0)}] * 2)
    assert mean["none"].shape == (0,)
    assert mean["one"].shape == ()


def test_the_arguments_are_left_alone() -> None:
    state = {"w": torch.tensor([2.0], requires_grad=True)}
    mean = weighted_mean([state, state], [1, 3])
    assert state["w"].item() == 2.0
    assert not mean["w"].requires_grad
    assert mean["w"].data_ptr() != state["w"].data_ptr()


def test_a_client_of_weight_zero_does_not_count() -> None:
    assert weighted_mean([{"w": torch.tensor([1.0])}, {"w": torch.tensor([9.0])}], [2, 0])["w"].item() == 1.0


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to aggregate"):
        weighted_mean([])


def test_different_names_are_refused_and_named() -> None:
    with pytest.raises(ValueError, match="at 1 has bias, which the one at 0 lacks"):
        weighted_mean([{"w": torch.ones(1)}, {"w": torch.ones(1), "bias": torch.ones(1)}])


def test_different_shapes_are_refused_and_shown() -> None:
    with pytest.raises(ValueError, match=r"'w' has shape \[3\] in the state dict at 1, and \[2\]"):
        weighted_mean([{"w": torch.ones(2)}, {"w": torch.ones(3)}])


def test_an_entry_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="'w' of the state dict at 0 is a float"):
        weighted_mean([{"w": 1.0}])  # type: ignore[dict-item]


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_unusable_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be finite"):
        weighted_mean([{"w": torch.ones(1)}] * 2, weights)


def test_a_missing_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="2 state dicts need as many weights, not 1"):
        weighted_mean([{"w": torch.ones(1)}] * 2, [1])


def test_a_client_of_weight_zero_does_not_count_whatever_its_values() -> None:
    states = [{"w": torch.tensor([float("nan")])}, {"w": torch.tensor([1.0])}, {"w": torch.tensor([float("inf")])}]
    assert weighted_mean(states, [0, 2, 0])["w"].item() == 1.0


def test_different_kinds_of_dtype_are_refused_and_shown() -> None:
    """Which client comes first would else decide whether the mean is rounded."""
    with pytest.raises(ValueError, match="'n' is float in the state dict at 1, and integer in the one at 0"):
        weighted_mean([{"n": torch.tensor(1)}, {"n": torch.tensor(1.5)}])


def test_dtypes_of_one_kind_may_be_mixed() -> None:
    states = [{"w": torch.tensor([value], dtype=dtype)} for value, dtype in zip((1, 2, 3), FLOATS, strict=True)]
    mean = weighted_mean(states, [1, 3, 2])["w"]
    assert mean.dtype == torch.float32
    assert mean.item() == torch.tensor(13 / 6).item()


@pytest.mark.parametrize("num_states", [1, 2, 3, 5, 8, 13, 100])
def test_the_bits_are_those_of_a_reduce(num_states: int) -> None:
    generator = torch.Generator().manual_seed(num_states)
    states = [
        {
            "w": torch.randn(50, generator=generator) * 10.0 ** (place % 5),
            "half": torch.randn(50, generator=generator).bfloat16(),
            "double": torch.randn(50, generator=generator).double(),
            "complex": torch.randn(50, dtype=torch.complex64, generator=generator),
            "count": torch.randint(1000, (50,), generator=generator),
            "mask": torch.rand(50, generator=generator) > 0.5,
        }
        for place in range(num_states)
    ]
    for weights in ([place % 3 + 1 for place in range(num_states)], [0.1 + place % 3 for place in range(num_states)]):
        forest = Forest(WeightedMean(), num_states)
        for place in reversed(range(num_states)):
            forest.add(place, {"model_weights": states[place], "num_samples": weights[place]})
        mean, reduced = weighted_mean(states, weights), merged(forest.take(), num_states).finish()
        assert all(torch.equal(mean[name], reduced[name]) for name in mean)
        assert all(mean[name].dtype == reduced[name].dtype for name in mean)
